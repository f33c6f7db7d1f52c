/* Words of visual tokens, drawn over their cells and as a table. A map is {ids, coefficients, cosines, residual_norms, words}. */

const SMALLEST = 0.4, INK = "#212529";

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

/* The word of each cell in one round of the pursuit; the larger its share, the larger the word. */
function drawWords(map, grid, turn, shares) {
  return map.ids.map((ids, cell) => {
    const word = map.words[ids[turn]], { x, y, width, height } = cellBox(grid, cell);
    const size = Math.min(0.42 * height * (SMALLEST + (1 - SMALLEST) * shares[cell]), 0.95 * width / widthOf(word.text));
    return svgElement("text", {
      x: x + width / 2, y: y + height / 2, "font-size": size.toFixed(3), fill: word.colour ?? INK,
      "font-weight": word.colour ? 600 : 400,
    }, word.text);
  });
}

/* Cosines of one round as shares of the largest cosine. */
const sharesOf = (map, turn, top) => map.cosines.map((cosines) => top > 0 ? Math.max(cosines[turn], 0) / top : 0);

/* The words of a cell round by round. */
function wordTable(map, cell, marksWords) {
  const table = made("table", null, made("tr", null, ...["word", "coefficient", "cosine", "left"].map((name) => made("th", name))));
  map.ids[cell].forEach((id, turn) => {
    const word = map.words[id], name = made("td", null), swatch = made("span", null);
    swatch.className = "swatch";
    swatch.style.background = word.colour ?? INK;
    name.append(swatch, word.text);
    if (word.special) name.append(" ", made("i", "special"));
    else if (!word.starts_word && marksWords) name.append(" ", made("i", "no space before"));
    name.title = `token ${id}`;
    const left = map.residual_norms[cell][turn + 1] / (map.residual_norms[cell][0] || 1);
    table.append(made("tr", null, name, made("td", number(map.coefficients[cell][turn])),
      made("td", number(map.cosines[cell][turn])), made("td", `${Math.round(100 * left)}%`)));
  });
  return table;
}

/* How many cells of a map would fit beside each other over the whole drawing. */
function cellsAcross(size, grid) {
  return boxAround(size, grid).width / cellBox(grid, 0).width;
}
