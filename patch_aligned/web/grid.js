"use strict";

/* Cells of visual tokens over an image, as SVG. A grid is {x_edges, y_edges} in pixels of the image, from left to right
   and from top to bottom; cells are numbered row by row. */

const SVG = "http://www.w3.org/2000/svg";

function svgElement(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const columnsOf = (grid) => grid.x_edges.length - 1;
const rowsOf = (grid) => grid.y_edges.length - 1;

/* The rectangle of a cell. */
function cellBox(grid, cell) {
  const column = cell % columnsOf(grid), row = Math.floor(cell / columnsOf(grid));
  const x = grid.x_edges[column], y = grid.y_edges[row];
  return { x, y, width: grid.x_edges[column + 1] - x, height: grid.y_edges[row + 1] - y };
}

/* The cell under a point of the image; null outside the grid. */
function cellAt(grid, [x, y]) {
  const column = grid.x_edges.findLastIndex((edge) => edge <= x), row = grid.y_edges.findLastIndex((edge) => edge <= y);
  const inside = column >= 0 && column < columnsOf(grid) && row >= 0 && row < rowsOf(grid);
  return inside ? row * columnsOf(grid) + column : null;
}

/* The rectangle around the image and all its cells, which may reach beyond it. */
function boxAround([width, height], grid) {
  const x = Math.min(0, grid.x_edges[0]), y = Math.min(0, grid.y_edges[0]);
  return { x, y, width: Math.max(width, grid.x_edges.at(-1)) - x, height: Math.max(height, grid.y_edges.at(-1)) - y };
}

/* An image of a size in a drawing whose coordinates are its pixels. */
function drawImage([width, height], picture, box = { x: 0, y: 0, width, height }) {
  const svg = svgElement("svg", { viewBox: `${box.x} ${box.y} ${box.width} ${box.height}`, role: "img" });
  if (picture) svg.append(svgElement("image", { href: picture, width, height, preserveAspectRatio: "none" }));
  return svg;
}

/* Cells with their fills (by cell; others stay clear), and lines between them. */
function drawCells(grid, fills) {
  const filled = [...fills].map(([cell, fill]) => svgElement("rect", { ...cellBox(grid, cell), ...fill }));
  const [left, right] = [grid.x_edges[0], grid.x_edges.at(-1)], [top, bottom] = [grid.y_edges[0], grid.y_edges.at(-1)];
  const lines = [
    ...grid.x_edges.map((x) => `M${x} ${top}V${bottom}`), ...grid.y_edges.map((y) => `M${left} ${y}H${right}`),
  ].join("");
  return svgElement("g", { class: "cells" }, ...filled, svgElement("path", { d: lines, class: "lines", fill: "none" }));
}

/* The outline of a set of cells, as a path: each side that no other cell of the set shares. */
function outlineOf(grid, cells) {
  const chosen = new Set(cells), columns = columnsOf(grid);
  return [...chosen].flatMap((cell) => {
    const { x, y, width, height } = cellBox(grid, cell), column = cell % columns;
    return [
      chosen.has(cell - columns) ? "" : `M${x} ${y}h${width}`,
      chosen.has(cell + columns) ? "" : `M${x} ${y + height}h${width}`,
      column > 0 && chosen.has(cell - 1) ? "" : `M${x} ${y}v${height}`,
      column < columns - 1 && chosen.has(cell + 1) ? "" : `M${x + width} ${y}v${height}`,
    ];
  }).join("");
}

/* The point of the image under the pointer. */
function pointUnder(svg, event) {
  const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [x, y];
}

/* The centre of the cell that an arrow key leads to from the cell at a point; of the first cell where there is none.
   Null for another key; the point itself at the grid's edge. */
function pointAfterKey(grid, at, key) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (!step) return null;
  const cell = at && cellAt(grid, at), { x, y, width, height } = cellBox(grid, cell ?? 0);
  const [across, down] = cell === null ? [0, 0] : step;
  const next = [x + (across + 0.5) * width, y + (down + 0.5) * height];
  return cellAt(grid, next) === null ? at : next;
}

/* Put a frame around the cell at a point, or hide it. */
function frameCell(frame, grid, at) {
  const cell = at && cellAt(grid, at);
  frame.setAttribute("visibility", cell === null ? "hidden" : "visible");
  if (cell !== null) for (const [key, value] of Object.entries(cellBox(grid, cell))) frame.setAttribute(key, value);
}

if (typeof module !== "undefined") module.exports = { cellBox, cellAt, boxAround, outlineOf, pointAfterKey };
