const HEAT = [[24, 16, 64], [112, 28, 124], [208, 56, 92], [248, 144, 60], [252, 236, 164]];
const COLD_TO_WARM = [[37, 99, 201], [245, 245, 245], [217, 95, 2]];
const TOOLS = { token: "Token", rectangle: "Rectangle", freehand: "Freehand" };

/* The colour at a share 0..1 of a scale. */
function colourAt(scale, share) {
  const place = Math.min(Math.max(share, 0), 1) * (scale.length - 1), low = Math.min(Math.floor(place), scale.length - 2);
  return `rgb(${scale[low].map((part, i) => Math.round(part + (scale[low + 1][i] - part) * (place - low))).join(" ")})`;
}

/* What is shown, as the fragment of a link, and back. */
const writeState = (state) => new URLSearchParams(Object.entries({
  image: state.image, word: state.word, at: state.at?.map(Math.round).join(), region: state.region?.map(Math.round).join(),
  one: state.less?.[0], other: state.less?.[1],
}).filter(([, value]) => value)).toString();

function readState(text) {
  const given = new URLSearchParams(text);
  const numbers = (name) => {
    const found = given.get(name)?.split(",").map(Number);
    return found?.every(Number.isFinite) ? found : null;
  };
  const less = [given.get("one"), given.get("other")];
  return { image: given.get("image"), word: given.get("word") ?? "", at: numbers("at"), region: numbers("region"), less: less.every(Boolean) ? less : null };
}

function start(data) {
  const element = (id) => document.getElementById(id), names = Object.keys(data.projectors);
  const panels = element("panels");
  let state = readState(location.hash.slice(1)), tool = "token";
  let picture = null, words = null, heat = null, regions = null;  // the server's answers about what is shown
  let listed = [], nextRecord = 0, turn = 0;

  /* --- Questions to the server. An answer that a later turn has overtaken is dropped. */

  async function ask(path, body) {
    const isFile = body instanceof Blob;
    const options = body && { method: "POST", body: isFile ? body : JSON.stringify(body), headers: { "Content-Type": isFile ? "application/octet-stream" : "application/json" } };
    const response = await fetch(path, options);
    const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }

  function say(text, isError = false) {
    element("status").textContent = text;
    element("status").className = isError ? "error" : "";
  }

  async function during(text, work) {
    const own = ++turn;
    say(text);
    try {
      await work(() => own === turn);
      if (own === turn) say("");
    } catch (error) {
      if (own === turn) say(error instanceof TypeError ? "The server does not answer. Is the command still running?" : error.message, true);
    }
  }

  const open = (question, kept = {}) => during("Opening the image …", async (isLatest) => {
    const opened = await ask(...question);
    if (!isLatest()) return;
    picture = opened;
    words = heat = regions = null;
    state = { ...state, at: null, region: null, ...kept, image: picture.image };
    element("word").value = state.word;
    render();
    await update(isLatest);
  });
  const openImage = (image, kept) => open(["image", { image }], kept);
  const openFile = (file) => file && open(["upload", file]);

  /* Ask for what the state needs and is not there yet. */
  async function update(isLatest) {
    const { image, word, less, at, region } = state;
    history.replaceState(null, "", `#${writeState(state)}`);
    if (!words) {
      say("Finding words …");
      const found = await ask("words", { image });
      if (!isLatest()) return;
      words = found;
      render();
    }
    const about = word && JSON.stringify([word, less]);
    if ((heat?.about ?? "") !== about) {  // drawing again would take the focus from a panel
      const found = word ? await ask("heat", { image, word, less }) : null;
      if (!isLatest()) return;
      heat = found && { about, ...found };
      render();
    }
    const where = at ? { point: at } : region ? { polygon: region } : null;
    const chosen = where ? await ask("region", { image, ...where }) : null;
    if (!isLatest()) return;
    regions = chosen?.regions ?? null;
    mark();
  }

  function change(changes) {
    state = { ...state, ...changes };
    if ("at" in changes || "region" in changes) regions = null;
    if (!picture) return;
    mark();
    during("", update);
  }

  /* --- Drawing */

  function render() {
    const maps = heat ? heat.maps : words ? words.maps : names.map((projector) => ({ projector }));
    const figures = maps.map((map) => figureOf(map, heat ? drawHeat(map) : words ? drawFirstWords(map) : null));
    if (heat?.difference) {
      const { difference } = heat, most = Math.max(...difference.cosine.map(Math.abs), 1e-9);
      const projector = `${state.less[0]} less ${state.less[1]}`;
      figures.push(figureOf({ ...difference, projector }, {
        fills: difference.cosine.map((value, cell) => [cell, { fill: colourAt(COLD_TO_WARM, 0.5 + value / most / 2), opacity: 0.75 }]),
        note: scaleBar(COLD_TO_WARM, -most, most),
      }));
    }
    panels.replaceChildren(...figures);
    element("labels").replaceChildren(...picture.labels.map((label) => {
      const button = made("button", label);
      button.setAttribute("aria-pressed", label === state.word);
      button.onclick = () => seek(label === state.word ? "" : label);
      return button;
    }));
    for (const child of element("strip").children) child.setAttribute("aria-current", child.value === state.image);
    element("legend").textContent = heat
      ? `Colours run from each map's lowest cosine to its highest. Pink: tokens above the threshold (${data.rule}).` +
        (heat.truth ? " Green: the regions annotated with this label." : picture.labels.length ? " No region of this image has this label." : "") +
        (heat.difference ? ` Orange: where ${state.less[0]} is higher; blue: where ${state.less[1]} is.` : "")
      : words
        ? `The nearest word of each token; the larger it is, the larger its cosine (largest here: ${number(words.top_cosine)}). ` +
          (data.word_list ? `English words have a colour each (list: ${data.word_list}). ` : "") + `Found by ${data.method}.`
        : "";
    mark();
  }

  const scaleBar = (scale, low, high) => {
    const bar = made("span", null);
    bar.className = "bar";
    bar.style.background = `linear-gradient(to right, ${scale.map((_, i) => colourAt(scale, i / (scale.length - 1))).join()})`;
    return [`cosine ${number(low)}`, bar, `${number(high)} `];
  };

  function drawHeat(map) {
    const low = Math.min(...map.cosine), high = Math.max(...map.cosine), span = high - low || 1;
    return {
      fills: map.cosine.map((value, cell) => [cell, { fill: colourAt(HEAT, (value - low) / span), opacity: 0.72 }]),
      lines: [
        ...(heat.truth ? [svgElement("path", { d: pathOfMask(runLengths(heat.truth), picture.size[1]), class: "truth" })] : []),
        svgElement("path", { d: outlineOf(map.grid, map.predicted), class: "predicted" }),
      ],
      note: [...scaleBar(HEAT, low, high), map.iou === null ? "" : `· IoU ${number(map.iou)}`],
    };
  }

  function drawFirstWords(map) {
    const shares = sharesOf(map, 0, words.top_cosine);
    return { fills: [], lines: drawWords(map, map.grid, 0, shares), note: [map.captions[0]] };
  }

  /* A panel: the picture, what is drawn over it, and the marks of the chosen token or region. */
  function figureOf(map, drawing) {
    const box = map.grid ? boxAround(picture.size, map.grid) : undefined;
    const svg = drawImage(picture.size, picture.picture, box);
    svg.setAttribute("aria-label", `${map.projector}, ${state.word || "words of the tokens"}`);
    const caption = made("figcaption", null, made("b", map.projector), ...(drawing?.note ?? ["…"]));
    if (map.grid) {
      const radius = Math.max(...picture.size) / 160;
      svg.append(svgElement("filter", { id: "outline" },
        svgElement("feMorphology", { operator: "dilate", radius, result: "wide" }),
        svgElement("feComposite", { in: "wide", in2: "SourceGraphic", operator: "out" })));
      if (drawing.fills.length) svg.classList.add("grey");
      else svg.append(svgElement("rect", { ...box, fill: "#fff", opacity: 0.64 }));
      svg.append(drawCells(map.grid, drawing.fills), ...(drawing.lines ?? []));
      const marks = { covered: svgElement("path", { class: "covered" }), region: svgElement("path", { class: "region" }), frame: svgElement("rect", { class: "pointed" }) };
      svg.append(...Object.values(marks));
      svg.mark = () => {
        const cells = regions?.find((entry) => entry.projector === map.projector)?.cells ?? [];
        marks.covered.setAttribute("d", state.region ? outlineOf(map.grid, cells) : "");
        marks.region.setAttribute("d", state.region ? `M${state.region.join(" ")}Z` : "");
        frameCell(marks.frame, map.grid, state.at);
      };
      listen(svg, map.grid);
    }
    return made("figure", null, caption, svg);
  }

  /* Show the chosen token or region on all panels, and its words beside them. */
  function mark() {
    for (const svg of panels.querySelectorAll("svg")) svg.mark?.();
    const patch = element("patch");
    if (!regions) {
      const how = { token: "Click a token", rectangle: "Draw a rectangle", freehand: "Draw around a region" }[tool];
      // Words of before stay until others come: a phone's page would move under the finger that draws.
      if (!state.at && !state.region) patch.replaceChildren(made("p", `${how} to see its words with their coefficients.`));
      return;
    }
    patch.replaceChildren(made("h2", state.at ? "Words of the token" : "Words of the region's mean token"), ...regions.map((entry) => {
      if (!entry.cells.length) {
        const why = state.at ? "sees nothing of this part of the image" : `no token that the region covers by ${100 * data.min_coverage}%`;
        return made("section", null, made("h3", entry.projector), made("p", why));
      }
      const { grid } = words.maps.find((map) => map.projector === entry.projector), columns = columnsOf(grid);
      const [cell] = entry.cells, marks = words.maps.some((map) => Object.values(map.words).some((word) => word.starts_word));
      const where = state.at ? `row ${Math.floor(cell / columns) + 1}, column ${cell % columns + 1}` : `mean of ${entry.cells.length} tokens`;
      return made("section", null, made("h3", entry.projector), made("p", `${where}, length ${number(entry.residual_norms[0][0])}`), wordTable(entry, 0, marks));
    }));
  }

  /* --- Choosing tokens and regions */

  function listen(svg, grid) {
    let drawn = null;  // corners so far, while a region is drawn
    svg.setAttribute("tabindex", 0);
    const corners = ([[left, top], [right, bottom]]) => [left, top, right, top, right, bottom, left, bottom];
    const inImage = (event) => pointUnder(svg, event).map((value, axis) => Math.min(Math.max(value, 0), picture.size[axis]));
    svg.onpointerdown = (event) => {
      if (tool === "token" || event.button) return;
      svg.setPointerCapture(event.pointerId);
      drawn = [inImage(event)];
    };
    svg.onpointermove = (event) => {
      if (!drawn) return;
      const at = inImage(event);
      if (tool === "rectangle") drawn = [drawn[0], at];
      else if (Math.hypot(at[0] - drawn.at(-1)[0], at[1] - drawn.at(-1)[1]) > Math.max(...picture.size) / 150) drawn.push(at);
      state = { ...state, at: null, region: tool === "rectangle" ? corners(drawn) : drawn.flat() };
      regions = null;
      mark();
    };
    svg.onpointerup = svg.onpointercancel = () => {
      const region = drawn && state.region;
      drawn = null;
      if (region?.length >= 6) change({ at: null, region });
    };
    svg.onclick = (event) => {
      const at = pointUnder(svg, event);
      if (tool === "token") change({ at: cellAt(grid, at) === null ? null : at, region: null });
    };
    svg.onkeydown = (event) => {
      const next = pointAfterKey(grid, state.at ?? svg.corner ?? null, event.key);
      if (!next) return;
      event.preventDefault();
      event.stopPropagation();
      if (!event.shiftKey || !(state.at || svg.corner)) {
        svg.anchor = svg.corner = null;
        return change({ at: next, region: null });
      }
      svg.anchor ??= state.at;
      svg.corner = next;
      const boxes = [svg.anchor, next].map((at) => cellBox(grid, cellAt(grid, at)));
      const edges = ["x", "y"].map((axis) => [Math.min(...boxes.map((box) => box[axis])), Math.max(...boxes.map((box) => box[axis] + (axis === "x" ? box.width : box.height)))]);
      change({ at: null, region: corners([[edges[0][0], edges[1][0]], [edges[0][1], edges[1][1]]]) });
    };
  }

  function choose(name) {
    tool = name;
    for (const button of element("tools").children) button.setAttribute("aria-pressed", button.value === tool);
    panels.classList.toggle("brush", tool !== "token");
    if (picture) mark();
  }

  function seek(word) {
    element("word").value = word;
    change({ word: word.trim() });
  }

  /* --- Images of the set */

  async function list(text, from = 0) {
    const found = await ask(`images?${new URLSearchParams({ text, start: from })}`);
    if (text !== element("search").value.trim()) return;
    listed = from ? [...listed, ...found.images] : found.images;
    nextRecord = found.next;
    element("strip").replaceChildren(...listed.map((entry) => {
      const button = made("button", entry.thumbnail ? null : entry.image), shown = made("img", null);
      button.value = button.title = entry.image;
      button.setAttribute("aria-current", entry.image === state.image);
      shown.alt = entry.image;
      if (entry.thumbnail) {
        shown.src = entry.thumbnail;
        button.append(shown);
      }
      button.onclick = () => openImage(entry.image);
      return button;
    }));
    if (nextRecord !== null) {
      const more = made("button", listed.length ? "more" : "search on");
      more.onclick = () => list(text, nextRecord);
      element("strip").append(more);
    } else if (!listed.length) element("strip").append("No image of the set has this text.");
  }

  function step(by) {
    const place = listed.findIndex((entry) => entry.image === state.image) + by;
    const entry = listed[Math.max(place, 0)];
    if (entry && entry.image !== state.image) openImage(entry.image);
    element("strip").children[Math.max(place, 0)]?.scrollIntoView({ block: "nearest", inline: "center" });
  }

  /* --- Saving */

  function save(name, address) {
    const link = made("a", null);
    Object.assign(link, { href: address, download: name });
    link.click();
  }
  const saveText = (name, kind, text) => {
    const address = URL.createObjectURL(new Blob([text], { type: kind }));
    save(name, address);
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };
  const styles = () => document.querySelector("style").textContent;

  /* The panels side by side under their captions. */
  async function savePng() {
    const width = 640, gap = 16, head = 64, drawn = [...panels.querySelectorAll("figure")];
    const heights = drawn.map((figure) => width * figure.querySelector("svg").viewBox.baseVal.height / figure.querySelector("svg").viewBox.baseVal.width);
    const size = [drawn.length * (width + gap) + gap, Math.max(...heights) + head + gap];
    const sheet = svgElement("svg", { xmlns: SVG, width: size[0], height: size[1] }, svgElement("style", {}, styles() + "svg text { text-anchor: start; } svg svg text { text-anchor: middle; }"),
      svgElement("rect", { width: size[0], height: size[1], fill: "#fff" }));
    drawn.forEach((figure, place) => {
      const x = gap + place * (width + gap), copy = figure.querySelector("svg").cloneNode(true);
      for (const [key, value] of Object.entries({ x, y: head, width, height: heights[place] })) copy.setAttribute(key, value);
      const note = [...figure.querySelector("figcaption").childNodes].slice(1).map((node) => node.className === "bar" ? " … " : node.textContent).join("");
      sheet.append(svgElement("text", { x, y: 22, "font-size": 18, "font-weight": 600, fill: INK }, figure.querySelector("b").textContent),
        svgElement("text", { x, y: 46, "font-size": 14, fill: INK }, `${state.word && `“${state.word}”  `}${note}`), copy);
    });
    const shown = new Image();
    shown.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(sheet))}`;
    await shown.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: size[0], height: size[1] });
    canvas.getContext("2d").drawImage(shown, 0, 0);
    save("tokens.png", canvas.toDataURL("image/png"));
  }

  /* The panels and words as a page of their own, which runs no script and loads nothing. */
  function saveHtml() {
    const page = document.implementation.createHTMLDocument(`${state.image} ${state.word}`);
    const policy = page.createElement("meta"), style = page.createElement("style"), coding = page.createElement("meta");
    coding.setAttribute("charset", "utf-8");
    Object.assign(policy, { httpEquiv: "Content-Security-Policy", content: "default-src 'none'; img-src data:; style-src 'unsafe-inline'" });
    style.textContent = styles();
    page.head.prepend(coding, policy, style);
    const main = page.createElement("main"), title = page.createElement("h1");
    title.textContent = `${state.image} ${state.word}`;
    const left = page.createElement("section"), right = page.createElement("aside");
    left.append(title, ...[panels, element("legend")].map((node) => page.importNode(node, true)));
    right.append(page.importNode(element("patch"), true));
    main.append(left, right);
    page.body.append(main, page.importNode(element("sources").parentNode, true));
    saveText("tokens.html", "text/html", `<!doctype html>\n${page.documentElement.outerHTML}\n`);
  }

  function saveJson() {
    const { picture: _, ...about } = picture;
    saveText("tokens.json", "application/json", JSON.stringify({ ...about, ...state, projectors: data.projectors, method: data.method, rule: data.rule, words, heat, regions }, null, 1) + "\n");
  }

  /* --- The page's controls */

  for (const [name, title] of Object.entries(TOOLS)) {
    const button = made("button", title);
    Object.assign(button, { value: name, type: "button", title: `${title} (${name[0]})`, onclick: () => choose(name) });
    element("tools").append(button);
  }
  const pairs = names.flatMap((one) => names.filter((other) => other !== one).map((other) => [one, other]));
  element("less").append(new Option("no difference", ""), ...pairs.map((pair, i) => new Option(`${pair[0]} less ${pair[1]}`, i)));
  element("less").hidden = !pairs.length;
  element("less").value = pairs.findIndex((pair) => pair.join() === state.less?.join());
  if (element("less").selectedIndex < 0) element("less").selectedIndex = 0;
  element("less").onchange = () => change({ less: pairs[element("less").value] ?? null });
  element("seek").onsubmit = (event) => { event.preventDefault(); seek(element("word").value); };
  element("word").onsearch = element("word").onchange = () => { if (element("word").value.trim() !== state.word) seek(element("word").value); };
  element("file").onchange = (event) => openFile(event.target.files[0]);
  element("previous").onclick = () => step(-1);
  element("next").onclick = () => step(1);
  let typing;
  element("search").oninput = () => { clearTimeout(typing); typing = setTimeout(() => list(element("search").value.trim()), 200); };
  element("link").onclick = async () => {
    await navigator.clipboard?.writeText(location.href).catch(() => null);
    say("The link is in the address bar, and copied where the browser allows it.");
  };
  const saving = { png: savePng, html: saveHtml, json: saveJson };
  for (const [id, write] of Object.entries(saving)) element(id).onclick = () => picture ? write() : say("Open an image first.", true);
  document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("dropping"); };
  document.ondragleave = (event) => event.relatedTarget ?? document.body.classList.remove("dropping");
  document.ondrop = (event) => { event.preventDefault(); document.body.classList.remove("dropping"); openFile(event.dataTransfer.files[0]); };
  document.onpaste = (event) => openFile(event.clipboardData.files[0]);
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select")) { if (event.key === "Escape") event.target.blur(); return; }
    const name = Object.keys(TOOLS).find((name) => name[0] === event.key);
    if (name) choose(name);
    else if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "/") element("word").focus();
    else if (event.key === "Escape") change({ at: null, region: null });
    else return;
    event.preventDefault();
  };
  window.onhashchange = () => {
    const { image, ...kept } = state = readState(location.hash.slice(1));
    if (image) openImage(image, kept);
  };

  for (const [name, source] of Object.entries(data.projectors)) element("sources").append(made("dt", name), made("dd", source));
  choose("token");
  const empty = made("p", data.images ? "Choose an image above, or drop your own here." : "Drop an image here, paste one, or open one.");
  empty.id = "empty";
  panels.append(empty);
  element("turn").hidden = element("strip").hidden = !data.images;
  const { image, ...kept } = state;
  if (data.images) list("").then(() => { if (!image && listed.length) openImage(listed[0].image); }, (error) => say(error.message, true));
  if (image) openImage(image, kept);
}

if (typeof module !== "undefined") module.exports = { colourAt, writeState, readState };
else start(JSON.parse(document.getElementById("data").textContent));
