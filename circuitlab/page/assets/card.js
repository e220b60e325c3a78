// Card: what is known of the selected component or edge, or of the whole circuit.
const card = el("card");

function select(what, { focus = false } = {}) {
  selected.node = what?.node ?? null;
  selected.edge = what?.edge ?? null;
  card.replaceChildren(...(selected.node !== null ? ofNode(selected.node) : selected.edge !== null ? ofEdge(selected.edge) : ofCircuit()));
  card.scrollTop = 0;
  el("said").textContent = selected.node !== null ? spoken(selected.node) : selected.edge !== null ? edgeName(selected.edge) : "";
  for (const button of el("components").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(Number(button.dataset.node) === selected.node));
  }
  if (focus) card.focus();
  redraw();
}

function spoken(index) {
  const near = selectedEdges() || [];
  const into = near.filter((edge) => edges.target[edge] === index).length;
  return `${nodes[index].name} ${nodes[index].full_role || nodes[index].role || ""}, ${into} in, ${near.length - into} out`;
}

const shut = () => make("button", { type: "button", class: "shut", "aria-label": "Select nothing", onclick: () => select(null) }, "×");

function facts(pairs, className = "facts") {
  return make("dl", { class: className }, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function part(title, ...children) {
  return make("section", {}, ...(title ? [make("h3", {}, ...[title].flat())] : []), ...children);
}

const aside = (text) => make("span", {}, text);

function ofCircuit() {
  const { about } = data;
  const found = [make("h2", { class: "words" }, about.title)];
  if (about.reason) found.push(make("p", { class: "sub" }, `${about.verdict}: ${about.reason}`));
  if (about.facts.length) found.push(part("", facts(about.facts)));
  if (compared) found.push(part("Compared", facts(ownerCounts().map(([, words, n]) => [words, `${counted(n)} edges`]))));
  if (about.findings.length) found.push(part("Findings", facts(about.findings, "findings")));
  for (const text of about.warnings) found.push(make("p", { class: "quiet" }, text));
  found.push(part("Score", make("p", { class: "quiet" }, about.score)));
  found.push(part("", make("p", { class: "quiet" }, "Click a component or an edge, or search with /. Press ? for all keys.")));
  return found;
}

function ownerCounts() {
  const counts = { a: 0, b: 0, both: 0 };
  for (const owner of edges.owner) counts[owner] += 1;
  const words = data.owners;
  return ["a", "b", "both"].map((owner) => [owner, words[owner], counts[owner]]);
}

function ofNode(index) {
  const node = nodes[index], detail = data.details[index] || {};
  const found = [shut(), make("h2", {}, node.name)];
  const where = [node.kind, node.layer === undefined ? "" : `layer ${node.layer}`, node.position === undefined ? "" : `position ${node.position}`];
  found.push(make("p", { class: "sub" }, where.filter(Boolean).join(" · ")));
  const roles = [detail.role, node.full_role, node.token === undefined ? null : `token ${node.token}`];
  for (const role of new Set(roles.filter(Boolean))) found.push(make("span", { class: "tag" }, role));
  if (detail.effects) found.push(effectsBothWays(detail.effects));
  if (detail.pattern) found.push(attention(detail.pattern));
  if (detail.card) found.push(featureCard(detail.card));
  found.push(...ways("Reads from", index, incoming[index], edges.source), ...ways("Feeds", index, outgoing[index], edges.target));
  found.push(...values(node.data));
  return found;
}

/** Edges into or out of a component as a list, strongest first. */
function ways(title, index, list, ends) {
  const here = list.filter((edge) => shownSet.has(edge));
  if (!list.length) return [];
  const hidden = list.length - here.length;
  const most = 60;
  const note = hidden ? `${here.length} of ${list.length} shown` : String(here.length);
  const rows = here.slice(0, most).map((edge) => {
    const port = portOf(edge), other = ends[edge];
    const name = title === "Feeds" && port ? `${nodes[other].name}:${port}` : nodes[other].name;
    const through = title !== "Feeds" && port ? `as ${port}` : "";
    return make("li", {},
      make("button", { type: "button", title: nodes[other].tip, onclick: () => { select({ node: other }); reveal(other); } },
        make("span", { class: "name" }, name), make("span", { class: "role" }, through || nodes[other].role)),
      bar(strengthOf(edge), `meter c-${colourOf(edge)}`),
      make("button", { type: "button", class: "score", "aria-label": `Edge ${edgeName(edge)}`, onclick: () => select({ edge }) }, figures(edges.score[edge], signed)));
  });
  const more = here.length > most ? [make("p", { class: "quiet" }, `and ${here.length - most} weaker ones`)] : [];
  return [part([title, " ", aside(note)], make("ul", { class: "ways" }, ...rows), ...more)];
}

function effectsBothWays(effects) {
  const words = {
    noise: "noise: it alone is corrupt, the rest clean",
    denoise: "denoise: it alone is clean, the rest corrupt",
  };
  const largest = Math.max(...Object.values(effects).map((value) => Math.abs(value))) || 1;
  const rows = Object.keys(words).filter((way) => way in effects).map((way) => [way, effects[way]]).map(([way, value]) => [
    make("p", { class: "quiet" }, words[way]),
    make("p", {}, figures(value, true), " ", bar(Math.abs(value) / largest, `bars c-${signColour(value)}`)),
  ]);
  return part("Effect both ways", ...rows.flat());
}

const signColour = (value) => (value === 0 ? "neutral" : data.helps ? (value < 0 ? "helps" : "hurts") : value < 0 ? "negative" : "positive");

function featureCard(found) {
  if (found.svg) {
    const address = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(found.svg);
    return part("Feature card", make("img", { alt: "Feature card", src: address }));
  }
  return part("Feature card", ...found.lines.map((line) => make("p", {}, line)));
}

/** An attention pattern: rows are queries, columns the keys they look at. */
function attention({ tokens, values }) {
  const n = tokens.length, wide = 272, side = Math.max(1, Math.floor(wide / n)), ratio = 2;
  const drawn = make("canvas", { width: side * n * ratio, height: side * n * ratio, role: "img", tabindex: "0" });
  // Every cell has a whole number of device pixels.
  const target = drawn.getContext("2d");
  const says = make("p", { class: "says" });
  const tell = (row, column) => {
    says.textContent = `query ${row} ${tokens[row]} → key ${column} ${tokens[column]}: ${figures(values[row][column])}`;
  };
  let marked = null;
  const paint = () => {
    const [r, g, b] = rgb(shades.accent), [r0, g0, b0] = rgb(shades.place);
    values.forEach((row, i) => row.forEach((value, j) => {
      if (j > i && value === 0) return;
      const mix = (from, to) => Math.round(from + (to - from) * Math.sqrt(Math.min(1, value)));
      target.fillStyle = `rgb(${mix(r0, r)}, ${mix(g0, g)}, ${mix(b0, b)})`;
      target.fillRect(j * side * ratio, i * side * ratio, (side - (side > 4 ? 0.5 : 0)) * ratio, (side - (side > 4 ? 0.5 : 0)) * ratio);
    }));
    if (!marked) return;
    target.strokeStyle = shades.ink;
    target.lineWidth = 3;
    target.strokeRect(marked[1] * side * ratio, marked[0] * side * ratio, side * ratio, side * ratio);
  };
  const mark = (row, column) => {
    marked = [Math.max(0, Math.min(n - 1, row)), Math.max(0, Math.min(n - 1, column))];
    target.clearRect(0, 0, drawn.width, drawn.height);
    paint();
    tell(...marked);
  };
  let strongest = [n > 1 ? 1 : 0, 0];
  values.forEach((row, i) => row.forEach((value, j) => { if (i && value > values[strongest[0]][strongest[1]]) strongest = [i, j]; }));
  drawn.setAttribute("aria-label", `Attention pattern, ${n} by ${n}; arrow keys read it cell by cell`);
  drawn.addEventListener("mousemove", (event) => {
    const box = drawn.getBoundingClientRect();
    mark(Math.floor(((event.clientY - box.top) / box.height) * n), Math.floor(((event.clientX - box.left) / box.width) * n));
  });
  drawn.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const from = marked || strongest;
    mark(from[0] + step[0], from[1] + step[1]);
    el("said").textContent = says.textContent;
  });
  paint();
  tell(...strongest);
  return part(["Attention ", aside("rows: queries, columns: keys")], drawn, says);
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function ofEdge(edge) {
  const score = edges.score[edge];
  const found = [shut(), make("h2", {}, edgeName(edge))];
  found.push(make("p", { class: "sub" }, `${counted(edge + 1)}. strongest of ${counted(data.n_effects)}`));
  found.push(make("p", { class: `big c-${compared ? signColour(score) : colourOf(edge)}` }, figures(score, signed)));
  if (signed) found.push(make("p", { class: "quiet" }, score === 0 ? "exactly 0" : data.signs[score < 0 ? 0 : 1]));
  const rows = [];
  const tell = (name, words, show = (value) => figures(value, true)) => {
    const value = field(name, edge);
    if (value !== undefined && value !== null) rows.push([words, show(value)]);
  };
  if (compared) {
    rows.push(["in", data.owners[edges.owner[edge]] || edges.owner[edge]]);
    tell("score_a", "score in A");
    tell("score_b", "score in B");
  }
  tell("exact", "patched");
  tell("confirmed", "confirmed", (value) => (value ? "yes" : "no"));
  tell("inclusion", "found again", (value) => `in ${Math.round(100 * value)} % of resamples`);
  tell("kept", "in the circuit", (value) => (value ? "yes" : "no, measured only"));
  const port = { q: "as query", k: "as key", v: "as value" }[portOf(edge)];
  if (port) rows.push(["read", port]);
  if (rows.length) found.push(part("", facts(rows)));
  const ends = [["From", edges.source[edge]], ["To", edges.target[edge]]].map(([words, index]) =>
    [words, make("button", { type: "button", onclick: () => { select({ node: index }); reveal(index); } }, nodes[index].name)]);
  found.push(part("Ends", facts(ends)));
  const told = new Set(["score_a", "score_b", "exact", "confirmed", "inclusion", "kept"]);
  const rest = {};
  for (const name of Object.keys(edges.columns)) {
    const value = field(name, edge);
    if (!told.has(name) && value !== undefined) rest[name] = value;
  }
  found.push(...values(rest));
  return found;
}

/** Whatever else is known, by its form: pairs as bars, mappings of mappings as tables. */
function values(known) {
  const plain = [], parts = [];
  for (const [name, value] of Object.entries(known)) {
    const words = name.replaceAll("_", " ");
    if (value === null || typeof value !== "object") plain.push([words, told(value)]);
    else if (isPairs(value)) parts.push(part(words, pairs(value)));
    else if (isTable(value)) parts.push(make("section", {}, make("details", {}, make("summary", {}, words), table(value))));
    else plain.push([words, told(value)]);
  }
  return [...parts, ...(plain.length ? [part("Data", facts(plain))] : [])];
}

function told(value) {
  if (typeof value === "number") return figures(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(told).join(", ");
  if (value && typeof value === "object") return Object.entries(value).map(([name, item]) => `${name} ${told(item)}`).join("; ");
  return String(value);
}

const isPairs = (value) => Array.isArray(value) && value.length > 0 &&
  value.every((item) => Array.isArray(item) && item.length === 2 && typeof item[0] === "string" && typeof item[1] === "number");
const isTable = (value) => !Array.isArray(value) && Object.keys(value).length > 0 &&
  Object.values(value).every((row) => row && typeof row === "object" && !Array.isArray(row));

function pairs(list) {
  const largest = Math.max(...list.map((item) => Math.abs(item[1]))) || 1;
  return make("div", { class: "pairs" }, ...list.flatMap(([name, value]) =>
    [make("span", { class: "name" }, name), bar(Math.abs(value) / largest, ""), make("span", {}, figures(value))]));
}

function table(rows) {
  const columns = [...new Set(Object.values(rows).flatMap(Object.keys))];
  const head = make("tr", {}, make("th", {}, ""), ...columns.map((name) => make("th", { class: "number" }, name)));
  const body = Object.entries(rows).map(([name, row]) => make("tr", {}, make("td", {}, name),
    ...columns.map((column) => make("td", { class: "number" }, row[column] === undefined ? "" : told(row[column])))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}
