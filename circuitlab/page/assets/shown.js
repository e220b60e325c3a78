// Shown: what the reader asks to see, and the edges and components that this leaves.
const kinds = [...new Set(nodes.map((node) => node.kind))];
const choice = {
  count: Math.min(data.first, nEdges),
  signs: new Set([-1, 0, 1]),
  ports: new Set(edges.ports),
  kinds: new Set(kinds),
  owners: new Set(["a", "b", "both"]),
  inclusion: 0,
  measured: false,
  query: "",
  layout: 0,
};
let shown = [];
let shownSet = new Set();
let shownNodes = new Set();
let matching = null;

const isKept = (edge) => field("kept", edge) !== false;
const nMeasured = edges.score.filter((_, edge) => !isKept(edge)).length;

function passes(edge) {
  return (
    choice.signs.has(Math.sign(edges.score[edge])) &&
    choice.ports.has(portOf(edge)) &&
    choice.kinds.has(nodes[edges.source[edge]].kind) &&
    choice.kinds.has(nodes[edges.target[edge]].kind) &&
    (!compared || choice.owners.has(edges.owner[edge])) &&
    (choice.inclusion === 0 || (field("inclusion", edge) ?? 0) >= choice.inclusion) &&
    (choice.measured || isKept(edge))
  );
}

function textOf(node) {
  const tokens = Array.isArray(node.data.top_tokens) ? node.data.top_tokens.map((item) => item[0]) : [];
  node.text ??= [node.name, node.label, node.role, node.full_role, node.tip, node.token, node.detailRole, ...tokens]
    .filter(Boolean).join("\n").toLowerCase();
  return node.text;
}

/** Choose anew; edges are strongest first, so the strongest are a beginning. */
function choose() {
  shown = [];
  for (let edge = 0; edge < choice.count; edge++) if (passes(edge)) shown.push(edge);
  shownSet = new Set(shown);
  shownNodes = new Set();
  for (const edge of shown) shownNodes.add(edges.source[edge]).add(edges.target[edge]);
  if (choice.count === nEdges || nodes.length <= 60) {
    // Components without an edge belong to the circuit too, unless a filter leaves out their edges.
    nodes.forEach((node, index) => {
      if (choice.kinds.has(node.kind) && !incoming[index].length && !outgoing[index].length) shownNodes.add(index);
    });
  }
  const words = choice.query.trim().toLowerCase();
  matching = words ? new Set([...shownNodes].filter((index) => textOf(nodes[index]).includes(words))) : null;
}
