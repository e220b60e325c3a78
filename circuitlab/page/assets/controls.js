// Controls: search, filters and legend.
const LISTED = 200;

/** Choose anew and show it. */
function refresh() {
  choose();
  if (selected.edge !== null && !shownSet.has(selected.edge)) select(null);
  else if (selected.node !== null) select({ node: selected.node });
  tellCount();
  listComponents();
  redraw();
}

function tellCount() {
  const all = data.n_effects - (choice.measured ? 0 : nMeasured), noun = all === 1 ? data.noun : `${data.noun}s`;
  const model = data.n_model && data.n_model > all ? `; the model has ${counted(data.n_model)}` : "";
  el("count").replaceChildren("Showing ", make("b", {}, counted(shown.length)), ` of ${counted(all)} ${noun}${model}`,
    ...(data.n_effects > nEdges ? [`. The page holds the strongest ${counted(nEdges)}.`] : []));
  canvas.setAttribute("data-shown", String(shown.length));
}

function listComponents() {
  const weight = new Map([...shownNodes].map((index) => [index, 0]));
  for (const edge of shown) {
    for (const end of [edges.source[edge], edges.target[edge]]) weight.set(end, weight.get(end) + Math.abs(edges.score[edge]));
  }
  const list = [...(matching || shownNodes)].sort((a, b) => weight.get(b) - weight.get(a) || a - b);
  el("n-listed").textContent = list.length > LISTED ? `${LISTED} of ${counted(list.length)}` : counted(list.length);
  el("components").replaceChildren(...list.slice(0, LISTED).map((index) => {
    const node = nodes[index];
    return make("li", {}, make("button", {
      type: "button", "data-node": index, title: node.tip, "aria-current": String(index === selected.node),
      onclick: () => { select({ node: index }); reveal(index); },
    }, make("span", { class: "name" }, node.label), make("span", { class: "role" }, node.role)));
  }));
}

function field_set(title, ...children) {
  return make("fieldset", {}, make("legend", { class: "field" }, ...[title].flat()), ...children);
}

function check(words, set, value, { swatch = null, note = "" } = {}) {
  const input = make("input", { type: "checkbox", onchange: () => {
    if (input.checked) set.add(value); else set.delete(value);
    refresh();
  } });
  input.checked = set.has(value);
  return make("label", { class: "check" }, input, swatch, make("span", {}, words), note ? make("small", {}, note) : null);
}

const swatchOf = (colour, dash = "solid") => make("i", { class: `dash ${dash} c-${colour}`, "aria-hidden": "true" });

/** A slider whose label carries its figures. */
function slider(title, steps, start, show, act) {
  const figure = make("output", {});
  const input = make("input", { type: "range", min: "0", max: String(steps), value: String(start), "aria-label": title });
  const tell = () => {
    figure.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", figure.textContent);
  };
  let waiting = false;
  input.addEventListener("input", () => {
    tell();
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      act(Number(input.value));
    });
  });
  tell();
  return field_set([title, figure], input);
}

const STEPS = 400;
/** Counts grow with the square: fine steps where few edges are shown. */
const countAt = (step) => (step === STEPS ? nEdges : Math.max(1, Math.round(nEdges * (step / STEPS) ** 2)));

function strengthSlider() {
  const first = choice.count;
  const start = first === nEdges ? STEPS : Math.round(STEPS * Math.sqrt(first / nEdges));
  const counted = (step) => (step === start ? first : countAt(step));
  const show = (step) => `${figures(Math.abs(edges.score[counted(step) - 1]))} and more`;
  return slider("|score|", STEPS, start, show, (step) => {
    choice.count = counted(step);
    refresh();
  });
}

function layoutChoice() {
  const words = { layers: "layers", positions: "token positions" };
  return field_set("Layout", make("div", { class: "checks" }, ...data.layouts.map(({ name }, number) => {
    const input = make("input", { type: "radio", name: "layout", value: name, onchange: () => {
      choice.layout = number;
      fit();
    } });
    input.checked = number === choice.layout;
    return make("label", { class: "check" }, input, words[name]);
  })));
}

function buildSieve() {
  const parts = [];
  const scores = edges.score;
  if (data.layouts.length > 1) parts.push(layoutChoice());
  if (nEdges > 1) parts.push(strengthSlider());
  if (compared) {
    parts.push(field_set("Which circuit", make("div", { class: "checks column" }, ...ownerCounts().map(([owner, words, n]) =>
      check(words, choice.owners, owner, { swatch: swatchOf(owner, dashes[owner]), note: counted(n) })))));
  }
  const signs = [-1, 1, 0].filter((sign) => scores.some((score) => Math.sign(score) === sign));
  if (signs.length > 1) {
    parts.push(field_set("Sign", make("div", { class: "checks column" }, ...signs.map((sign) =>
      check(signWords(sign), choice.signs, sign, { swatch: compared ? null : swatchOf(signShade(sign), signDash()) })))));
  }
  if (edges.ports.length > 1) {
    parts.push(field_set("Read as", make("div", { class: "checks" }, ...portOrder().map((port) => check(port || "one input", choice.ports, port)))));
  }
  if (kinds.length > 1) {
    parts.push(field_set("Kind", make("div", { class: "checks" }, ...kinds.map((kind) => check(kind, choice.kinds, kind)))));
  }
  if (edges.columns.inclusion) {
    parts.push(slider("Found again", 100, 0, (percent) => (percent ? `in ${percent} % or more` : "in any resample"), (percent) => {
      choice.inclusion = percent / 100;
      refresh();
    }));
  }
  if (nMeasured) {
    const input = make("input", { type: "checkbox", onchange: () => {
      choice.measured = input.checked;
      refresh();
    } });
    parts.push(field_set("Measured", make("label", { class: "check" }, input, "also what is not in the circuit")));
  }
  el("sieve").replaceChildren(...parts);
}

const portOrder = () => [..."qkv"].filter((port) => edges.ports.includes(port)).concat(edges.ports.filter((port) => !port || !"qkv".includes(port)));
const dashes = { a: "dashed", b: "dotted", both: "solid" };
const signWords = (sign) => (sign === 0 ? "exactly 0" : data.signs[sign < 0 ? 0 : 1]);
const signDash = () => (data.established ? "solid" : "dashed");
function signShade(sign) {
  if (sign === 0) return "neutral";
  if (!data.helps) return sign < 0 ? "negative" : "positive";
  return (data.established ? "" : "faint-") + (sign < 0 ? "helps" : "hurts");
}

function buildLegend() {
  const found = [];
  const item = (colour, dash, words) => found.push(make("span", {}, swatchOf(colour, dash), words));
  if (compared) for (const [owner, words, n] of ownerCounts()) item(owner, dashes[owner], `${words} (${counted(n)})`);
  else for (const sign of signed ? [-1, 1] : []) if (edges.score.some((score) => Math.sign(score) === sign)) item(signShade(sign), signDash(), signWords(sign));
  if (nEdges) found.push(make("span", {}, "width: |score|"));
  if (edges.ports.some((port) => "qkv".includes(port) && port)) found.push(make("span", {}, "q, k, v: read as query, key, value"));
  if (edges.columns.inclusion) found.push(make("span", {}, "faint: found again in few resamples"));
  if (edges.columns.redundant) item("neutral", "dashed", "redundant: others can stand in");
  if (nodes.some((node) => node.stacked)) found.push(make("span", {}, "stacked: features active together"));
  el("legend").replaceChildren(...found);
}
