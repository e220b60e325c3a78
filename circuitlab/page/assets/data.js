// Data: what the page holds, and small things that every part of it needs.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes;
const edges = data.edges;
const nEdges = edges.score.length;
const compared = Boolean(edges.owner);
const maxScore = nEdges ? Math.abs(edges.score[0]) || 1 : 1;

const el = (id) => document.getElementById(id);

/** An element: make("p", {class: "big"}, "text", child, …). Text is only ever text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A bar of a share 0 to 1, as SVG: its width is an attribute, not a style. */
function bar(share, className) {
  const svg = el("bar").cloneNode(true);
  svg.removeAttribute("id");
  svg.setAttribute("class", className);
  svg.firstChild.setAttribute("width", String(Math.max(1.5, 100 * Math.min(1, share))));
  return svg;
}

const counted = (n) => n.toLocaleString("en-US");

/** A number for people: three figures, a true minus sign; signed where the sign says something. */
function figures(value, signed = false) {
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  const plain = Number.isInteger(value) && size < 1e6;
  const text = plain ? String(size) : size < 1e-3 || size >= 1e6 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : signed ? "+" : "") + text.replace("-", "−");
}

/** Whether scores have a sign: else they are written without one. */
const signed = data.helps || edges.score.some((score) => score < 0);
const portOf = (edge) => edges.ports[edges.port[edge]];
const strengthOf = (edge) => Math.abs(edges.score[edge]) / maxScore;

function edgeName(edge) {
  const port = portOf(edge);
  return `${nodes[edges.source[edge]].name} → ${nodes[edges.target[edge]].name}${port ? ":" + port : ""}`;
}

/** The value of a column at an edge, or undefined where there is none. */
function field(name, edge) {
  const column = edges.columns[name];
  if (!column) return undefined;
  if (!column.at) return column.is[edge];
  column.places ??= new Map(column.at.map((at, place) => [at, place]));
  return column.is[column.places.get(edge)];
}

/** Which of the page's colours an edge has. */
function colourOf(edge) {
  if (compared) return edges.owner[edge];
  const score = edges.score[edge];
  if (score === 0) return "neutral";
  const sign = score < 0 ? 0 : 1;
  if (!data.helps) return ["negative", "positive"][sign];
  return (data.established ? ["helps", "hurts"] : ["faint-helps", "faint-hurts"])[sign];
}

function dashOf(edge) {
  if (compared) return { a: "dashed", b: "dotted" }[edges.owner[edge]] || "solid";
  return !data.established || field("redundant", edge) === true ? "dashed" : "solid";
}

const undirected = new Set(edges.undirected);
const incoming = nodes.map(() => []);
const outgoing = nodes.map(() => []);
for (let edge = 0; edge < nEdges; edge++) {
  outgoing[edges.source[edge]].push(edge);
  incoming[edges.target[edge]].push(edge);
}
