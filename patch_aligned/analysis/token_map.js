"use strict";

const SVG = "http://www.w3.org/2000/svg", CELL = 100, SMALLEST = 0.4, INK = "#212529";

function drawn(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function made(name, text, ...children) {
  const node = document.createElement(name);
  if (text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

const number = (value) => value.toFixed(2).replace("-", "−");

/* Width of a text as a multiple of its font size. */
const ruler = document.createElement("canvas").getContext("2d");
ruler.font = "600 100px system-ui, sans-serif";
const widths = new Map();
function widthOf(text) {
  if (!widths.has(text)) widths.set(text, Math.max(ruler.measureText(text).width / 100, 0.1));
  return widths.get(text);
}

function start(data) {
  const element = (id) => document.getElementById(id);
  const panels = element("panels");
  const rounds = data.images[0].maps[0].captions.length;
  let place = 0, round = 0, heat = false, pinned = null;  // round: -1 shows all

  function drawMap(image, map, turn) {
    const [rows, columns] = map.grid;
    const svg = drawn("svg", { viewBox: `0 0 ${columns * CELL} ${rows * CELL}`, role: "img", tabindex: 0 });
    svg.setAttribute("aria-label", `${map.projector}, ${map.captions[turn]}`);
    svg.style.minWidth = `${columns * 34}px`;
    svg.append(drawn("image", { href: image.pictures[image.picture_of[map.projector]], width: columns * CELL, height: rows * CELL, preserveAspectRatio: "none" }));
    svg.append(drawn("rect", { width: columns * CELL, height: rows * CELL, fill: "#fff", opacity: heat ? 0.8 : 0.64 }));
    map.ids.forEach((ids, token) => {
      const word = map.words[ids[turn]], cosine = map.cosines[token][turn];
      const share = image.top_cosine > 0 ? Math.max(cosine, 0) / image.top_cosine : 0;
      const x = (token % columns) * CELL, y = Math.floor(token / columns) * CELL;
      if (heat) svg.append(drawn("rect", { x, y, width: CELL, height: CELL, fill: "#f59f00", opacity: share }));
      const size = Math.min(0.42 * CELL * (SMALLEST + (1 - SMALLEST) * share), 0.95 * CELL / widthOf(word.text));
      svg.append(drawn("text", {
        x: x + CELL / 2, y: y + CELL / 2, "font-size": size.toFixed(1), fill: word.colour ?? INK,
        "font-weight": word.colour ? 600 : 400,
      }, word.text));
    });
    for (let column = 1; column < columns; column++)
      svg.append(drawn("line", { x1: column * CELL, x2: column * CELL, y1: 0, y2: rows * CELL }));
    for (let row = 1; row < rows; row++)
      svg.append(drawn("line", { y1: row * CELL, y2: row * CELL, x1: 0, x2: columns * CELL }));
    const frame = drawn("rect", { class: "pointed", width: CELL, height: CELL, visibility: "hidden" });
    svg.append(frame);
    const under = (event) => {
      const box = svg.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    svg.addEventListener("pointermove", (event) => pinned ?? point(under(event)));
    svg.addEventListener("pointerleave", () => pinned ?? point(null));
    svg.addEventListener("click", (event) => {
      const same = pinned && tokenAt(map, pinned) === tokenAt(map, under(event));
      pinned = same ? null : under(event);
      point(pinned ?? under(event));
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [x, y] = pinned ?? [0.5, 0.5];
      const inside = (value) => Math.min(Math.max(value, 0.001), 0.999);
      pinned = [inside(x + step[0] / columns), inside(y + step[1] / rows)];
      point(pinned);
    });
    svg.place = (at) => {
      const token = at && tokenAt(map, at);
      frame.setAttribute("visibility", at ? "visible" : "hidden");
      if (!at) return;
      frame.setAttribute("x", (token % columns) * CELL);
      frame.setAttribute("y", Math.floor(token / columns) * CELL);
    };
    return svg;
  }

  /* The token under a place of the image, given as shares of its width and height. */
  function tokenAt(map, [x, y]) {
    const [rows, columns] = map.grid;
    const within = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    return within(y, rows) * columns + within(x, columns);
  }

  /* Shows the words of the patches at a place, for every projector. */
  function point(at) {
    for (const svg of panels.querySelectorAll("svg")) svg.place(at);
    const patch = element("patch");
    if (!at) {
      patch.replaceChildren(made("p", "Point at a patch to see its words with their coefficients; a click or a tap keeps it."));
      return;
    }
    patch.replaceChildren();
    for (const map of data.images[place].maps) {
      const token = tokenAt(map, at), columns = map.grid[1];
      const table = made("table", null, made("tr", null, ...["word", "coefficient", "cosine", "left"].map((name) => made("th", name))));
      map.ids[token].forEach((id, turn) => {
        const word = map.words[id], name = made("td", null);
        const swatch = made("span", null);
        swatch.className = "swatch";
        swatch.style.background = word.colour ?? INK;
        name.append(swatch, word.text);
        if (word.special) name.append(" ", made("i", "special"));
        else if (!word.starts_word && data.marks_words) name.append(" ", made("i", "no space before"));
        name.title = `token ${id}`;
        const left = map.residual_norms[token][turn + 1] / (map.residual_norms[token][0] || 1);
        table.append(made("tr", null, name, made("td", number(map.coefficients[token][turn])),
          made("td", number(map.cosines[token][turn])), made("td", `${Math.round(100 * left)}%`)));
      });
      const where = `row ${Math.floor(token / columns) + 1}, column ${token % columns + 1}, length ${number(map.residual_norms[token][0])}`;
      patch.append(made("h3", map.projector), made("p", where), table);
    }
  }

  function render() {
    const image = data.images[place];
    const shown = round < 0 ? [...Array(rounds).keys()] : [round];
    const widest = Math.max(...image.maps.map((map) => map.grid[1]));
    panels.style.setProperty("--panel-width", `${Math.max(300, widest * 34)}px`);
    panels.style.setProperty("--projectors", image.maps.length);
    panels.className = round < 0 ? "all" : "";
    panels.replaceChildren(...shown.flatMap((turn) => image.maps.map((map) => {
      const scroll = made("div", null, drawMap(image, map, turn));
      scroll.className = "scroll";
      return made("figure", null, made("figcaption", null, made("b", map.projector), map.captions[turn]), scroll);
    })));
    element("picture").src = image.pictures[0];
    element("place").textContent = `${image.image_id} (${place + 1} of ${data.images.length})`;
    element("previous").disabled = place === 0;
    element("next").disabled = place === data.images.length - 1;
    [...element("rounds").children].forEach((button) => button.setAttribute("aria-pressed", String(Number(button.value) === round)));
    element("heat").setAttribute("aria-pressed", String(heat));
    const colours = data.word_list
      ? `English words (list: ${data.word_list}) have a colour each; all other tokens are black.`
      : "No English word list is installed, so all words have one colour.";
    element("legend").textContent =
      `The larger a word, the larger its cosine with what is left of the token before its round (largest in this image: ${number(image.top_cosine)}). ` +
      `${colours} “Left” is the length of what no word explains yet. Words found by ${data.method}.`;
    point(pinned);
  }

  for (const value of [...Array(rounds).keys(), ...(rounds > 1 ? [-1] : [])]) {
    const button = made("button", value < 0 ? "all" : `word ${value + 1}`);
    button.value = value;
    button.addEventListener("click", () => { round = value; render(); });
    element("rounds").append(button);
  }
  if (data.images.length === 1) for (const id of ["previous", "next"]) element(id).hidden = true;
  element("previous").addEventListener("click", () => { place--; pinned = null; render(); });
  element("next").addEventListener("click", () => { place++; pinned = null; render(); });
  element("heat").addEventListener("click", () => { heat = !heat; render(); });
  for (const [name, source] of Object.entries(data.projectors)) element("sources").append(made("dt", name), made("dd", source));
  render();
}

start(JSON.parse(document.getElementById("data").textContent));
