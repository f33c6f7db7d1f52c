/* Places of the set bits of a base64 text, the first bit of a byte first. */
function tokensOf(text) {
  const tokens = [];
  const bytes = atob(text);
  for (let bit = 0; bit < 8 * bytes.length; bit++)
    if (bytes.charCodeAt(bit >> 3) & (128 >> (bit & 7))) tokens.push(bit);
  return tokens;
}

/* Hues far apart for neighbours: steps of the golden angle. */
function colourOf(place, alpha) {
  return `hsl(${(210 + place * 137.508) % 360} 85% 52% / ${alpha})`;
}

function start(data) {
  const element = (id) => document.getElementById(id);
  const canvas = element("canvas"), context = canvas.getContext("2d");
  const layers = { masks: true, boxes: true, labels: true, tokens: false };
  let shown = data.records, place = 0, chosen = null, pointed = null, svg = null, masks = [], tinted = new Map();

  const added = (parent, kind, text, className) => {
    const child = document.createElement(kind);
    if (text !== undefined) child.textContent = text;
    if (className) child.className = className;
    parent.append(child);
    return child;
  };

  function open(index) {
    place = Math.max(0, Math.min(index, shown.length - 1));
    chosen = pointed = null;
    const record = shown[place];
    for (const id of ["regions", "caption", "identity", "note"]) element(id).textContent = "";
    element("place").textContent = record ? `${place + 1} of ${shown.length}` : "nothing found";
    element("previous").disabled = place <= 0;
    element("next").disabled = place >= shown.length - 1;
    element("strip").childNodes.forEach((child, i) => child.setAttribute("aria-current", i === place));
    svg?.remove();
    svg = null;
    masks = [];
    tinted.clear();
    if (!record) return draw();
    element("strip").childNodes[place].scrollIntoView({ block: "nearest", inline: "center" });
    history.replaceState(null, "", `#${record.record}`);
    element("caption").textContent = record.caption || "(no caption)";
    const status = record.status ? `, ${record.status}` : "";
    element("identity").textContent = `${record.image_id}, ${record.size[0]} × ${record.size[1]}, record ${record.record}${status}`;
    element("note").textContent = record.problem || "";
    if (!record.regions.length) added(element("regions"), "li", "No regions.");
    record.regions.forEach(listRegion);
    const enlarge = Math.max(1, 900 / Math.max(...record.size));
    const scale = Math.min(enlarge, 1200 / Math.max(...record.size));
    canvas.width = Math.max(1, Math.round(record.size[0] * scale));
    canvas.height = Math.max(1, Math.round(record.size[1] * scale));
    masks = record.regions.map((region) => rasterise(runLengths(region.rle_mask), ...record.size, canvas.width, canvas.height));
    canvas.setAttribute("aria-label", `${record.image_id}: ${record.regions.map((region) => region.tag).join(", ")}`);
    svg = drawImage(record.size, record.picture);
    svg.setAttribute("aria-hidden", true);
    canvas.before(svg);
    draw();
  }

  function listRegion(region, index) {
    const row = added(added(element("regions"), "li"), "button");
    if (!region.tokens_covered) row.classList.add("unused");
    row.setAttribute("aria-pressed", false);
    const swatch = added(row, "span", "", "swatch");
    swatch.style.borderColor = colourOf(index, 1);
    swatch.style.background = region.tokens_covered ? colourOf(index, 0.5) : "none";
    added(row, "span", region.tag, "tag");
    const score = region.score === undefined ? "" : `${region.score} · `;
    added(row, "span", `${score}${region.area_percent} % · ${region.tokens_covered} tokens`, "numbers");
    const extra = region.tokens_covered ? region.extra : ["covers no token, not in the patch loss", region.extra].filter(Boolean).join("; ");
    if (extra) added(row, "span", extra, "extra");
    row.onclick = () => { chosen = chosen === index ? null : index; draw(); };
    row.onpointerenter = (event) => { if (event.pointerType === "mouse") { pointed = index; draw(); } };
    row.onpointerleave = () => { pointed = null; draw(); };
  }

  function draw() {
    const record = shown[place], { width, height } = canvas;
    context.clearRect(0, 0, width, height);
    if (!record) return;
    const alone = pointed ?? chosen;
    svg.classList.toggle("grey", layers.tokens || alone !== null); // the tokens' colours stand out
    element("regions").querySelectorAll("button").forEach((row, i) => row.setAttribute("aria-pressed", i === alone));
    const scale = width / record.size[0], scaleY = height / record.size[1];
    const visible = record.regions.map((_, i) => i).filter((i) => alone === null || i === alone);
    for (const old of svg.querySelectorAll(".cells, .unseen")) old.remove();
    if (layers.tokens || alone !== null) drawTokens(record, visible);
    if (layers.masks) for (const i of visible) context.drawImage(tint(i, layers.tokens || alone !== null), 0, 0);
    const longest = Math.max(width, height), line = Math.max(2, longest / 400), size = Math.max(15, Math.round(longest / 50));
    context.lineWidth = line;
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    for (const i of visible) {
      const [x1, y1, x2, y2] = record.regions[i].bbox;
      context.strokeStyle = colourOf(i, 1);
      if (layers.boxes) context.strokeRect(x1 * scale, y1 * scaleY, (x2 - x1) * scale, (y2 - y1) * scaleY);
      if (!layers.labels) continue;
      const tag = record.regions[i].tag, text = tag.length > 40 ? `${tag.slice(0, 39)}…` : tag;
      const labelWidth = context.measureText(text).width + size * 0.7, labelHeight = size * 1.45;
      const x = Math.max(0, Math.min(x1 * scale - line / 2, width - labelWidth));
      const above = y1 * scaleY - labelHeight;
      const below = y2 * scaleY + line / 2;
      const y = above >= 0 ? above : below + labelHeight <= height ? below : 0;
      context.fillStyle = colourOf(i, 0.92);
      context.fillRect(x, y, labelWidth, labelHeight);
      context.fillStyle = "#fff";
      context.shadowColor = "rgb(0 0 0 / .7)";
      context.shadowBlur = 3;
      context.fillText(text, x + size * 0.35, y + labelHeight / 2);
      context.shadowBlur = 0;
    }
  }

  /* A region's mask in its colour, with a border; kept until another image is opened. */
  function tint(i, outlineOnly) {
    const key = `${i} ${outlineOnly}`;
    if (tinted.has(key)) return tinted.get(key);
    const { width, height } = canvas, layer = document.createElement("canvas"), mask = masks[i];
    layer.width = width;
    layer.height = height;
    const border = Math.max(1, Math.round(width / 450)), pen = layer.getContext("2d");
    pen.fillStyle = colourOf(i, 1);
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
    const pixels = new ImageData(width, height);
    for (let y = 0, at = 0; y < height; y++)
      for (let x = 0; x < width; x++, at++) {
        if (!mask[at]) continue;
        const inside = x >= border && x < width - border && y >= border && y < height - border &&
          mask[at - border] && mask[at + border] && mask[at - border * width] && mask[at + border * width];
        pixels.data.set([red, green, blue, inside ? (outlineOnly ? 0 : 105) : 255], 4 * at);
      }
    pen.putImageData(pixels, 0, 0);
    tinted.set(key, layer);
    return layer;
  }

  /* The cells that the visible regions cover; the part of the image that no token sees is darkened. */
  function drawTokens(record, visible) {
    const { grid, size: [width, height] } = record;
    const [left, right] = [grid.x_edges[0], grid.x_edges.at(-1)], [top, bottom] = [grid.y_edges[0], grid.y_edges.at(-1)];
    const unseen = `M0 0H${width}V${height}H0ZM${left} ${top}H${right}V${bottom}H${left}Z`;
    svg.append(svgElement("path", { d: unseen, class: "unseen", "fill-rule": "evenodd" }));
    const fills = visible.flatMap((i) => tokensOf(record.regions[i].tokens).map((cell) => [cell, { fill: colourOf(i, 0.55) }]));
    svg.append(drawCells(grid, fills));
  }

  function toggle(name) {
    layers[name] = !layers[name];
    [...element("layers").children].forEach((button) => button.setAttribute("aria-pressed", layers[button.value]));
    draw();
  }

  function find(text) {
    const wanted = text.trim().toLowerCase();
    shown = data.records.filter((record) => !wanted || [record.image_id, record.caption, ...record.regions.map((region) => region.tag)]
      .some((words) => words.toLowerCase().includes(wanted)));
    const strip = element("strip");
    strip.textContent = "";
    shown.forEach((record, index) => {
      const button = added(strip, "button");
      button.title = record.image_id;
      button.onclick = () => open(index);
      if (!record.picture) return button.append("–");
      const image = added(button, "img");
      image.loading = "lazy";
      image.alt = record.image_id;
      image.src = record.picture;
    });
    open(0);
  }

  for (const name of Object.keys(layers)) {
    const button = added(element("layers"), "button", name[0].toUpperCase() + name.slice(1));
    button.value = name;
    button.title = `Key ${name[0]}`;
    button.setAttribute("aria-pressed", layers[name]);
    button.onclick = () => toggle(name);
  }
  if (data.pages.length > 1) data.pages.forEach((page, index) => {
    if (index === data.page) return added(element("pages"), "b", String(index + 1));
    added(element("pages"), "a", String(index + 1)).href = encodeURIComponent(page);
  });
  const tags = new Set(data.records.flatMap((record) => record.regions.map((region) => region.tag)));
  [...tags].sort().slice(0, 2000).forEach((tag) => { added(element("tags"), "option").value = tag; });
  element("legend").textContent = `Arrow keys turn; m, b, l, t switch layers; point at a region, or choose it, to see its tokens. ` +
    `Grid ${data.grid_shape.join(" × ")}, ${data.image_aspect_ratio}, a token belongs to a region that covers at least ${100 * data.min_coverage} % of its cell.`;
  element("previous").onclick = () => open(place - 1);
  element("next").onclick = () => open(place + 1);
  element("search").oninput = (event) => find(event.target.value);
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === element("search")) { if (event.key === "Escape") event.target.blur(); return; }
    const layer = Object.keys(layers).find((name) => name[0] === event.key);
    if (layer) toggle(layer);
    else if (event.key === "ArrowLeft") open(place - 1);
    else if (event.key === "ArrowRight") open(place + 1);
    else if (event.key === "Home") open(0);
    else if (event.key === "End") open(shown.length - 1);
    else if (event.key === "Escape") { chosen = null; draw(); }
    else if (event.key === "/") element("search").focus();
    else return;
    event.preventDefault();
  };
  let touchX = null, touchY = null;
  canvas.ontouchstart = (event) => { touchX = event.touches[0].clientX; touchY = event.touches[0].clientY; };
  canvas.ontouchend = (event) => {
    const x = event.changedTouches[0].clientX - touchX, y = event.changedTouches[0].clientY - touchY;
    if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) open(place + (x < 0 ? 1 : -1));
  };
  canvas.onmousemove = (event) => {
    const x = Math.floor(event.offsetX * canvas.width / canvas.clientWidth);
    const y = Math.floor(event.offsetY * canvas.height / canvas.clientHeight);
    const at = y * canvas.width + x, record = shown[place];
    const hit = masks.map((_, i) => i).filter((i) => masks[i][at]).sort((a, b) => record.regions[a].area_percent - record.regions[b].area_percent);
    const now = hit.length ? hit[0] : null;
    if (now !== pointed) { pointed = now; draw(); }
  };
  canvas.onmouseleave = () => { pointed = null; draw(); };
  const linked = data.records.findIndex((record) => `#${record.record}` === location.hash);
  find("");
  if (linked > 0) open(linked);
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
else module.exports = { tokensOf };
