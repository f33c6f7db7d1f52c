/* Run lengths of COCO's compressed RLE: five bits a character, from the fourth on the difference to the run before the last. */
function runLengths(text) {
  const runs = [];
  for (let place = 0; place < text.length;) {
    let value = 0, digits = 0, code;
    do {
      code = text.charCodeAt(place++) - 48;
      value += (code & 31) * 2 ** (5 * digits++);
    } while (code & 32);
    if (code & 16) value -= 2 ** (5 * digits);
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/* The mask at another size, 0 or 1 a pixel, row by row: each pixel takes what lies under its centre. */
function rasterise(runs, width, height, toWidth, toHeight) {
  const mask = new Uint8Array(toWidth * toHeight);
  const firstX = (x) => Math.ceil(x * toWidth / width - 0.5);
  const firstY = (y) => Math.ceil(y * toHeight / height - 0.5);
  let start = 0;
  runs.forEach((length, index) => {
    const end = start + length;
    if (index % 2 && length) {
      const last = Math.floor((end - 1) / height);
      for (let column = Math.floor(start / height); column <= last; column++) {
        const top = firstY(Math.max(start - column * height, 0));
        const bottom = firstY(Math.min(end - column * height, height));
        for (let x = firstX(column); x < firstX(column + 1); x++)
          for (let y = top; y < bottom; y++) mask[y * toWidth + x] = 1;
      }
    }
    start = end;
  });
  return mask;
}

/* The filled pixels as a path, a rectangle for each piece of a column. */
function pathOfMask(runs, height) {
  let start = 0;
  return runs.map((length, index) => {
    const pieces = [];
    if (index % 2) {
      for (let from = start; from < start + length;) {
        const x = Math.floor(from / height), y = from % height, piece = Math.min(height - y, start + length - from);
        pieces.push(`M${x} ${y}h1v${piece}h-1z`);
        from += piece;
      }
    }
    start += length;
    return pieces.join("");
  }).join("");
}

if (typeof module !== "undefined") module.exports = { runLengths, rasterise, pathOfMask };
