function start(data) {
  const element = (id) => document.getElementById(id);
  const panels = element("panels");
  const rounds = data.images[0].maps[0].captions.length;
  let index = 0, round = 0, heat = false, pinned = null;  // round: -1 shows all; pinned: a point of the image

  function drawMap(image, map, turn) {
    const { grid } = map, box = boxAround(image.size, grid);
    const svg = drawImage(image.size, image.picture, box);
    svg.setAttribute("tabindex", 0);
    svg.setAttribute("aria-label", `${map.projector}, ${map.captions[turn]}`);
    svg.style.minWidth = `${34 * cellsAcross(image.size, map.grid)}px`;
    svg.append(svgElement("rect", { ...box, fill: "#fff", opacity: heat ? 0.8 : 0.64 }));
    const shares = sharesOf(map, turn, image.top_cosine);
    svg.append(drawCells(grid, heat ? shares.map((share, cell) => [cell, { fill: "#f59f00", opacity: share }]) : []));
    svg.append(...drawWords(map, grid, turn, shares));
    const frame = svgElement("rect", { class: "pointed", visibility: "hidden" });
    svg.append(frame);
    const under = (event) => {
      const at = pointUnder(svg, event);
      return cellAt(grid, at) === null ? null : at;
    };
    svg.addEventListener("pointermove", (event) => pinned ?? point(under(event)));
    svg.addEventListener("pointerleave", () => pinned ?? point(null));
    svg.addEventListener("click", (event) => {
      const at = under(event);
      const same = pinned && at && cellAt(grid, pinned) === cellAt(grid, at);
      pinned = same ? null : at;
      point(pinned ?? at);
    });
    svg.addEventListener("keydown", (event) => {
      const next = pointAfterKey(grid, pinned, event.key);
      if (!next) return;
      event.preventDefault();
      pinned = next;
      point(pinned);
    });
    svg.mark = (at) => frameCell(frame, grid, at);
    return svg;
  }

  /* Show the words of the patches at a point of the image, for every projector. */
  function point(at) {
    for (const svg of panels.querySelectorAll("svg")) svg.mark(at);
    const patch = element("patch");
    patch.replaceChildren();
    if (!at) {
      patch.append(made("p", "Point at a patch to see its words with their coefficients; a click or a tap keeps it."));
      return;
    }
    for (const map of data.images[index].maps) {
      const cell = cellAt(map.grid, at), columns = columnsOf(map.grid);
      if (cell === null) {
        patch.append(made("h3", map.projector), made("p", "sees nothing of this part of the image"));
        continue;
      }
      const where = `row ${Math.floor(cell / columns) + 1}, column ${cell % columns + 1}, length ${number(map.residual_norms[cell][0])}`;
      patch.append(made("h3", map.projector), made("p", where), wordTable(map, cell, data.marks_words));
    }
  }

  function render() {
    const image = data.images[index];
    const shown = round < 0 ? [...Array(rounds).keys()] : [round];
    const widest = Math.max(...image.maps.map((map) => cellsAcross(image.size, map.grid)));
    panels.style.setProperty("--panel-width", `${Math.max(300, widest * 34)}px`);
    panels.style.setProperty("--projectors", image.maps.length);
    panels.className = round < 0 ? "all" : "";
    panels.replaceChildren(...shown.flatMap((turn) => image.maps.map((map) => {
      const scroll = made("div", null, drawMap(image, map, turn));
      scroll.className = "scroll";
      return made("figure", null, made("figcaption", null, made("b", map.projector), map.captions[turn]), scroll);
    })));
    element("picture").src = image.picture;
    element("place").textContent = `${image.image_id} (${index + 1} of ${data.images.length})`;
    element("previous").disabled = index === 0;
    element("next").disabled = index === data.images.length - 1;
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
  element("previous").addEventListener("click", () => { index--; pinned = null; render(); });
  element("next").addEventListener("click", () => { index++; pinned = null; render(); });
  element("heat").addEventListener("click", () => { heat = !heat; render(); });
  for (const [name, source] of Object.entries(data.projectors)) element("sources").append(made("dt", name), made("dd", source));
  render();
}

start(JSON.parse(document.getElementById("data").textContent));
