"use strict";

const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

// Headings over several columns: neighbours of one group share theirs.
const groupsOf = (columns) => {
  const groups = [];
  for (const [group] of columns) {
    const last = groups[groups.length - 1];
    if (last && last.group === group) last.count += 1;
    else groups.push({ group, count: 1 });
  }
  return groups;
};

const cellOf = ({ text, stderr, mark }) => {
  const cell = make("td", text);
  if (stderr) cell.append(" ", make("small", `±${stderr}`));
  if (mark) cell.append(` ${mark}`);
  return cell;
};

const tableOf = (block) => {
  const table = make("table");
  const head = table.appendChild(make("thead"));
  const groups = groupsOf(block.columns);
  if (groups.some(({ group }) => group)) {
    const row = head.appendChild(make("tr"));
    row.append(make("td"));
    for (const { group, count } of groups) row.append(make(group ? "th" : "td", group, { colspan: count }));
  }
  const names = head.appendChild(make("tr"));
  names.append(make("th", block.corner, { scope: "col" }));
  for (const [, name] of block.columns) names.append(make("th", name, { scope: "col" }));
  const body = table.appendChild(make("tbody"));
  let section = "";
  for (const row of block.rows) {
    if (row.section !== section) {
      section = row.section;
      const line = body.appendChild(make("tr"));
      line.append(make("th", section, { class: "section", colspan: block.columns.length + 1 }));
    }
    const line = body.appendChild(make("tr"));
    line.append(make("th", row.label, { scope: "row" }), ...row.cells.map(cellOf));
  }
  return table;
};

const place = document.getElementById("tables");
for (const block of JSON.parse(document.getElementById("data").textContent)) {
  const section = place.appendChild(make("section"));
  section.append(make("h1", block.title));
  section.appendChild(make("div", "", { class: "scroll" })).append(tableOf(block));
  const notes = section.appendChild(make("ul"));
  for (const note of block.notes) notes.append(make("li", note));
}
