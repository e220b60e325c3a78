// Canvas: how edges and components are drawn, whatever they are drawn on.
const shades = {};

/** Colours of the theme, from the style sheet. */
function readShades() {
  const style = getComputedStyle(document.documentElement);
  for (const name of [
    "helps", "hurts", "faint-helps", "faint-hurts", "negative", "positive", "neutral", "a", "b", "both",
    "canvas", "ink", "soft", "faint", "accent", "head", "head-line", "mlp", "gate", "place", "region", "end", "end-ink", "end-soft",
  ]) shades[name] = style.getPropertyValue("--" + name).trim();
}

const FILLS = {
  __proto__: null,
  input: "end", logits: "end", logit: "end", mlp: "mlp", gate: "gate", residual: "place", token: "place",
  error: "place", region: "region",
};
const ROUND = { __proto__: null, input: 9, logits: 9, logit: 9, head: 5, token: 9, feature: 9, cluster: 9, region: 12 };
const FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const DASHES = { solid: [], dashed: [5, 3], dotted: [1.5, 2.5] };
/** Beyond this many, lines are straight, solid and without arrows: all else takes three times as long. */
const CURVED = 2500;

const place = (node) => [data.layouts[choice.layout].x[node], data.layouts[choice.layout].y[node]];
const widthOf = (edge) => 0.7 + 3.3 * Math.sqrt(strengthOf(edge));

/** Start, two handles and end of an edge's curve, then the tip of its arrow; y grows downwards. */
function curveOf(edge) {
  const source = nodes[edges.source[edge]], target = nodes[edges.target[edge]];
  let [x0, y0] = place(edges.source[edge]);
  let [x1, tip] = place(edges.target[edge]);
  y0 -= source.h / 2;
  tip += target.h / 2;
  if (target.symbol?.feet) {
    const [dx, dy] = footOf(edge, target.symbol.feet);
    x1 += dx;
    tip += dy - target.h / 2;
  }
  const port = target.ports ? target.ports.indexOf(portOf(edge)) : -1;
  if (port >= 0) x1 += ((port + 0.5) / target.ports.length - 0.5) * target.w;
  const y1 = tip + (undirected.has(edge) ? 0 : headOf(edge));
  const rise = y0 - y1;
  const reach = Math.max(18, 0.4 * rise);
  // A line straight up would hide behind the boxes of its own column.
  const bow = Math.abs(x1 - x0) > 20 || rise < 60 ? 0 : 26 + 0.05 * rise;
  return [x0, y0, x0 + bow, y0 - reach, x1 + bow, y1 + reach, x1, y1, tip];
}

/** Where an edge enters a gate's symbol: edges in the order of where they come from. */
function footOf(edge, feet) {
  const from = (other) => place(edges.source[other])[0];
  const order = [...incoming[edges.target[edge]]].sort((a, b) => from(a) - from(b) || a - b);
  return feet[order.indexOf(edge)] || [0, 0];
}

const headOf = (edge) => 4.5 + 1.4 * widthOf(edge);

function drawEdge(context, edge, curved) {
  const [x0, y0, xa, ya, xb, yb, x1, y1, tip] = curveOf(edge);
  context.beginPath();
  context.moveTo(x0, y0);
  if (!curved) {
    context.lineTo(x1, tip);
    context.stroke();
    return;
  }
  context.bezierCurveTo(xa, ya, xb, yb, x1, y1);
  context.stroke();
  if (undirected.has(edge)) return;
  const half = 1.6 + 0.9 * context.lineWidth;
  context.beginPath();
  context.moveTo(x1, tip);
  context.lineTo(x1 - half, y1);
  context.lineTo(x1 + half, y1);
  context.fill();
}

/** Edges, weakest first; list is strongest first. loud: at full strength, whatever their score. */
function drawEdges(context, list, box, { dim = 1, loud = false } = {}) {
  const curved = list.length <= CURVED;
  const weakest = list.length ? strengthOf(list[list.length - 1]) : 0;
  const fade = loud || compared || list.length <= 40 || weakest >= 1 ? 0 : 0.65 / (1 - weakest);
  const thin = 0.7 / box.scale;
  let dash = "";
  for (let place = list.length - 1; place >= 0; place--) {
    const edge = list[place];
    if (outside(edge, box)) continue;
    const style = curved ? dashOf(edge) : "solid";
    if (style !== dash) context.setLineDash(DASHES[(dash = style)]);
    const found = field("inclusion", edge);
    const firm = found === undefined ? 1 : 0.25 + 0.75 * found;
    context.globalAlpha = dim * (1 - fade * (1 - strengthOf(edge))) * (loud ? 1 : firm);
    context.strokeStyle = context.fillStyle = shades[colourOf(edge)];
    context.lineWidth = Math.max(thin, widthOf(edge));
    drawEdge(context, edge, curved);
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

function outside(edge, box) {
  const [x0, y0] = place(edges.source[edge]), [x1, y1] = place(edges.target[edge]);
  return (
    Math.max(x0, x1) < box.left - 120 || Math.min(x0, x1) > box.right + 120 ||
    Math.max(y0, y1) < box.top - 60 || Math.min(y0, y1) > box.bottom + 60
  );
}

/** Scores on their edges, on a halo, where they cover no component and no stronger edge's score. */
function drawNumbers(context, list) {
  const boxes = [...shownNodes].map((index) => [...place(index), nodes[index].w / 2, nodes[index].h / 2 + 5]);
  for (const edge of list) {
    const half = 1.5 + 2.7 * figures(edges.score[edge], signed).length;
    const spots = [0.4, 0.25, 0.6, 0.75].map((part) => pointOf(edge, part));
    const free = spots.find(([x, y]) => !boxes.some(([atX, atY, w, h]) => Math.abs(x - atX) < w + half && Math.abs(y - atY) < h));
    if (!free) continue;
    boxes.push([...free, half, 11]);
    drawNumber(context, edge, ...free);
  }
}

/** The point of an edge's curve a part of the way along it. */
function pointOf(edge, part) {
  const [x0, y0, xa, ya, xb, yb, x1, y1] = curveOf(edge), rest = 1 - part;
  const at = (a, b, c, d) => rest ** 3 * a + 3 * rest ** 2 * part * b + 3 * rest * part ** 2 * c + part ** 3 * d;
  return [at(x0, xa, xb, x1), at(y0, ya, yb, y1)];
}

function drawNumber(context, edge, x, y) {
  context.font = `600 8.5px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 3.5;
  context.lineJoin = "round";
  context.strokeStyle = shades.canvas;
  context.fillStyle = shades[colourOf(edge)];
  const text = figures(edges.score[edge], signed);
  context.strokeText(text, x, y);
  context.fillText(text, x, y);
}

function boxPath(context, node, x, y, grow = 0) {
  context.beginPath();
  const round = Math.min(ROUND[node.kind] ?? 0, node.h / 2) + grow;
  context.roundRect(x - node.w / 2 - grow, y - node.h / 2 - grow, node.w + 2 * grow, node.h + 2 * grow, round);
}

/** A component; look: selected, matched, dim. */
function drawNode(context, index, scale, look) {
  const node = nodes[index], [x, y] = place(index);
  const ends = FILLS[node.kind] === "end";
  context.globalAlpha = look.dim ? 0.28 : 1;
  context.lineWidth = 1;
  context.strokeStyle = ends ? shades.end : shades["head-line"];
  context.fillStyle = shades[FILLS[node.kind] || "head"];
  if (node.symbol) drawSymbol(context, node, x, y);
  else {
    if (node.stacked) {
      boxPath(context, node, x + 3, y - 3);
      context.fill();
      context.stroke();
    }
    boxPath(context, node, x, y);
    context.fill();
    if (node.strange) context.setLineDash([4, 3]);
    context.stroke();
    context.setLineDash([]);
    if (scale > 0.38) drawWords(context, node, x, y, ends, scale);
  }
  if (look.selected || look.matched) {
    context.globalAlpha = 1;
    context.strokeStyle = shades.accent;
    context.lineWidth = (look.selected ? 2.4 : 1.6) / Math.max(0.6, Math.min(scale, 1.4));
    boxPath(context, node, x, y, 2.5);
    context.stroke();
  }
  context.globalAlpha = 1;
}

function drawWords(context, node, x, y, ends, scale) {
  const top = y - node.h / 2;
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  context.fillStyle = ends ? shades["end-ink"] : shades.ink;
  context.font = `11px ${FONT}`;
  context.fillText(node.label, x, top + 15.5, node.w - 4);
  if (scale < 0.62) return;
  context.font = `8px ${FONT}`;
  context.fillStyle = ends ? shades["end-soft"] : shades.soft;
  if (node.role) context.fillText(node.role, x, top + 26.5, node.w - 4);
  (node.ports || []).forEach((port, number, all) => {
    context.fillText(port.slice(0, 4), x + ((number + 0.5) / all.length - 0.5) * node.w, y + node.h / 2 - 3.5);
  });
}

function drawSymbol(context, node, x, y) {
  node.symbol.outlines.forEach((points, number) => {
    context.beginPath();
    context.moveTo(x + points[0][0], y + points[0][1]);
    for (let i = 1; i + 2 < points.length; i += 3) {
      context.bezierCurveTo(...[0, 1, 2].flatMap((step) => [x + points[i + step][0], y + points[i + step][1]]));
    }
    if (number === 0) context.fill();
    context.stroke();
  });
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = shades.ink;
  for (const [text, rise, size, weight] of [[...node.symbol.word, 600], [...(node.symbol.figure || ["", 0, 0]), 400]]) {
    context.font = `${weight} ${size}px ${FONT}`;
    if (text) context.fillText(text, x, y + rise);
  }
}
