const KEYS = { r: "right", n: "wrong name", m: "wrong mask", s: "skip" };

/* The box around the filled pixels: left, top, right, bottom. */
function boxOfMask(runs, height) {
  let at = 0, [left, top, right, bottom] = [Infinity, Infinity, 0, 0];
  runs.forEach((length, index) => {
    if (index % 2 && length) {
      const first = Math.floor(at / height), last = Math.floor((at + length - 1) / height), isWhole = last > first;
      [left, right] = [Math.min(left, first), Math.max(right, last + 1)];
      [top, bottom] = [Math.min(top, isWhole ? 0 : at % height), Math.max(bottom, isWhole ? height : (at + length - 1) % height + 1)];
    }
    at += length;
  });
  return [left, top, right, bottom];
}

/* A box with a margin, as far as it is in the image. */
function around([left, top, right, bottom], [width, height]) {
  const margin = 0.4 * Math.max(right - left, bottom - top);
  const x = Math.max(left - margin, 0), y = Math.max(top - margin, 0);
  return { x, y, width: Math.min(right + margin, width) - x, height: Math.min(bottom + margin, height) - y };
}

function start(data) {
  const element = (id) => document.getElementById(id);
  let state = null, busy = false, isNear = false;

  const button = (text, key, act) => {
    const made = document.createElement("button"), hint = document.createElement("kbd");
    hint.textContent = key;
    made.append(text, hint);
    made.onclick = act;
    return made;
  };

  /* Send something and show the answer. What is pressed meanwhile is dropped: it would be about another region. */
  async function ask(path, body) {
    if (busy) return;
    busy = true;
    try {
      const response = await fetch(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      state = answer;
      element("status").textContent = "";
      show();
    } catch (error) {
      element("status").textContent = error instanceof TypeError ? "The server does not answer. Is the command still running?" : error.message;
    }
    busy = false;
  }

  const say = (answer) => state?.number != null && ask("answer", [state.number, answer]);
  const undo = () => state?.last != null && ask("answer", [state.last, null]);
  const toggle = () => element("picture").classList.toggle("plain");
  const zoom = () => { isNear = !isNear; if (state?.number != null) show(); };

  function show() {
    const isOver = state.number === null;
    const done = state.judged + state.skipped;
    element("progress").textContent = `${done} of ${state.regions}` + (state.skipped ? `, ${state.skipped} skipped` : "");
    element("shares").replaceChildren(...Object.entries(state.shares).map(([name, [share, low, high]]) => {
      const row = document.createElement("tr"), percent = (value) => `${(100 * value).toFixed(1)}%`;
      row.append(document.createElement("th"), document.createElement("td"));
      row.children[0].textContent = name;
      row.children[1].textContent = `${percent(share)} (${percent(low)} … ${percent(high)})`;
      return row;
    }));
    element("question").textContent = isOver ? "All regions have an answer." : state.tag;
    element("identity").textContent = isOver ? "" : state.image_id;
    if (state.problem) element("status").textContent = state.problem;
    for (const one of element("answers").children) one.disabled = isOver;
    element("tools").children[0].disabled = state.last === null;
    element("picture").replaceChildren(...(isOver ? [] : [draw()]));
  }

  /* The picture, dark but for the region, which has an outline. */
  function draw() {
    const [width, height] = state.size, runs = runLengths(state.rle_mask), mask = pathOfMask(runs, height);
    const seen = isNear ? around(boxOfMask(runs, height), state.size) : { x: 0, y: 0, width, height };
    const radius = Math.max(seen.width, seen.height) / 320;
    const svg = drawImage(state.size, state.picture, seen);
    svg.setAttribute("aria-label", `${state.tag} in ${state.image_id}`);
    svg.append(
      svgElement("filter", { id: "outline", filterUnits: "userSpaceOnUse", x: 0, y: 0, width, height },
        svgElement("feMorphology", { operator: "dilate", radius, result: "wide" }),
        svgElement("feComposite", { in: "wide", in2: "SourceGraphic", operator: "out" })),
      svgElement("path", { class: "outside", d: `M0 0H${width}V${height}H0Z${mask}` }),
      svgElement("path", { class: "outline", d: mask }),
    );
    return svg;
  }

  for (const [key, answer] of Object.entries(KEYS)) element("answers").append(button(answer, key, () => say(answer)));
  element("tools").append(button("Undo", "u", undo), button("Hide mask", "h", toggle), button("Zoom", "z", zoom));
  element("legend").textContent = `Is this what the label says, and does the mask fit it? Drawn at random among all regions, seed ${data.seed}. Shares are of the regions judged, with Wilson's 95% interval; skipped ones do not count. Every answer is saved at once.`;
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (KEYS[event.key]) say(KEYS[event.key]);
    else if (event.key === "u") undo();
    else if (event.key === "h") toggle();
    else if (event.key === "z") zoom();
    else return;
    event.preventDefault();
  };
  ask("state", {});
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
else module.exports = { boxOfMask };
