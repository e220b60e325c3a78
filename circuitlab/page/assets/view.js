// View: what part of the circuit is seen, what is under the pointer, and when it is drawn.
const canvas = el("view");
const context = canvas.getContext("2d");
const still = document.createElement("canvas");
const view = { x: 0, y: 0, scale: 1, width: 1, height: 1, ratio: 1 };
const selected = { node: null, edge: null };
const seen = { x: 0, y: 0, scale: 1, ratio: 1 };
let stale = true, asked = false, moving = 0;
/** Beyond this many, edges are drawn again only when the view comes to rest. */
const HEAVY = 800;

function redraw(anew = true) {
  stale ||= anew;
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

/** The view moves: heavy circuits follow as a picture of themselves until it rests. */
function move() {
  clearTimeout(moving);
  moving = setTimeout(() => {
    moving = 0;
    redraw();
  }, 130);
  redraw(shown.length <= HEAVY);
}

function draw() {
  const { ratio, width, height } = view;
  if (stale) drawStill();
  Object.assign(canvas.dataset, { x: view.x, y: view.y, scale: view.scale });
  const zoom = view.scale / seen.scale;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = shades.canvas;
  context.fillRect(0, 0, width * ratio, height * ratio);
  const size = (zoom * ratio) / seen.ratio;
  context.setTransform(size, 0, 0, size, (view.x - zoom * seen.x) * ratio, (view.y - zoom * seen.y) * ratio);
  context.drawImage(still, 0, 0);
  drawAbove(context, ratio);
}

/** Edges, on a canvas of their own that stays as it is while only the view moves. */
function drawStill() {
  const { width, height } = view;
  // Very many lines hide in one another; half as fine they are drawn in a quarter of the time.
  const ratio = shown.length > CURVED ? 1 : view.ratio;
  still.width = width * ratio;
  still.height = height * ratio;
  drawBelow(still.getContext("2d"), ratio);
  Object.assign(seen, { x: view.x, y: view.y, scale: view.scale, ratio });
  stale = false;
}

function world(target, ratio) {
  target.setTransform(view.scale * ratio, 0, 0, view.scale * ratio, view.x * ratio, view.y * ratio);
  return {
    left: -view.x / view.scale, top: -view.y / view.scale, scale: view.scale,
    right: (view.width - view.x) / view.scale, bottom: (view.height - view.y) / view.scale,
  };
}

function drawBelow(target, ratio) {
  const box = world(target, ratio);
  const near = selectedEdges();
  drawEdges(target, shown, box, { dim: near ? 0.13 : 1 });
  if (near) drawEdges(target, near, box, { loud: true });
}

function drawAbove(target, ratio) {
  const box = world(target, ratio);
  const near = selectedEdges();
  const lit = near && new Set(near.flatMap((edge) => [edges.source[edge], edges.target[edge]]));
  if (lit && selected.node !== null) lit.add(selected.node);
  for (const index of shownNodes) {
    const node = nodes[index], [x, y] = place(index);
    if (x + node.w < box.left || x - node.w > box.right || y + node.h < box.top || y - node.h > box.bottom) continue;
    drawNode(target, index, view.scale, {
      selected: index === selected.node,
      matched: matching?.has(index),
      dim: lit ? !lit.has(index) : matching && !matching.has(index),
    });
  }
  const told = near && near.length <= 24 ? near : shown.length <= 16 ? shown : [];
  if (view.scale > 0.55) drawNumbers(target, told);
}

/** Edges at the selection, strongest first, or null. */
function selectedEdges() {
  if (selected.edge !== null) return [selected.edge];
  if (selected.node === null) return null;
  return [...incoming[selected.node], ...outgoing[selected.node]].filter((edge) => shownSet.has(edge)).sort((a, b) => a - b);
}

function resize() {
  const box = canvas.getBoundingClientRect();
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  if (!box.width || (box.width === view.width && box.height === view.height && ratio === view.ratio)) return;
  const first = view.width === 1;
  view.x += first ? 0 : (box.width - view.width) / 2;
  view.y += first ? 0 : (box.height - view.height) / 2;
  Object.assign(view, { width: box.width, height: box.height, ratio });
  canvas.width = box.width * ratio;
  canvas.height = box.height * ratio;
  if (first) fit();
  redraw();
}

/** See all that is shown. */
function fit() {
  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (const index of shownNodes.size ? shownNodes : nodes.keys()) {
    const node = nodes[index], [x, y] = place(index);
    box[0] = Math.min(box[0], x - node.w / 2);
    box[1] = Math.min(box[1], y - node.h / 2);
    box[2] = Math.max(box[2], x + node.w / 2);
    box[3] = Math.max(box[3], y + node.h / 2);
  }
  if (box[0] === Infinity) return;
  const margin = { x: 28, above: 52, below: el("legend").offsetHeight + 26 };
  const room = [view.width - 2 * margin.x, view.height - margin.above - margin.below];
  view.scale = Math.max(0.03, Math.min(1.7, room[0] / (box[2] - box[0]), room[1] / (box[3] - box[1])));
  view.x = view.width / 2 - (view.scale * (box[0] + box[2])) / 2;
  view.y = margin.above + room[1] / 2 - (view.scale * (box[1] + box[3])) / 2;
  redraw();
}

function zoom(factor, x = view.width / 2, y = view.height / 2) {
  const scale = Math.max(0.03, Math.min(8, view.scale * factor));
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  move();
}

/** Bring a component into sight, if it is not. */
function reveal(index) {
  const [x, y] = place(index);
  const at = [view.x + view.scale * x, view.y + view.scale * y];
  const inside = at[0] > 40 && at[0] < view.width - 40 && at[1] > 40 && at[1] < view.height - 40;
  if (inside && view.scale > 0.3) return;
  view.scale = Math.max(view.scale, 0.7);
  view.x = view.width / 2 - view.scale * x;
  view.y = view.height / 2 - view.scale * y;
  move();
}

/** What is at a place of the canvas: {node}, {edge} or null. */
function under(px, py) {
  const x = (px - view.x) / view.scale, y = (py - view.y) / view.scale;
  for (const index of [...shownNodes].reverse()) {
    const node = nodes[index], [nx, ny] = place(index);
    if (Math.abs(x - nx) <= node.w / 2 + 1 && Math.abs(y - ny) <= node.h / 2 + 1) return { node: index };
  }
  let best = null, least = 6 / view.scale;
  for (const edge of (selected.node !== null && selectedEdges()) || shown) {
    const away = distance(edge, x, y, least, shown.length <= CURVED);
    if (away < least) [best, least] = [edge, away];
  }
  return best === null ? null : { edge: best };
}

function distance(edge, x, y, most, curved) {
  const [x0, y0, xa, ya, xb, yb, x1, y1, tip] = curveOf(edge);
  if (x < Math.min(x0, xa, xb, x1) - most || x > Math.max(x0, xa, xb, x1) + most) return Infinity;
  if (y < Math.min(y0, y1, tip, ya, yb) - most || y > Math.max(y0, y1, tip, ya, yb) + most) return Infinity;
  let least = Infinity, px = x0, py = y0;
  const steps = curved ? 20 : 1;
  for (let step = 1; step <= steps; step++) {
    const t = step / steps, u = 1 - t;
    const qx = curved ? u * u * u * x0 + 3 * u * u * t * xa + 3 * u * t * t * xb + t * t * t * x1 : x1;
    const qy = curved ? u * u * u * y0 + 3 * u * u * t * ya + 3 * u * t * t * yb + t * t * t * y1 : tip;
    const dx = qx - px, dy = qy - py;
    const along = Math.max(0, Math.min(1, ((x - px) * dx + (y - py) * dy) / (dx * dx + dy * dy || 1)));
    least = Math.min(least, Math.hypot(x - px - along * dx, y - py - along * dy));
    [px, py] = [qx, qy];
  }
  return least;
}

/** The view as a picture of its own, twice as fine, with a caption. */
function saveImage() {
  const ratio = 2, foot = 26;
  const image = document.createElement("canvas");
  image.width = view.width * ratio;
  image.height = (view.height + foot) * ratio;
  const target = image.getContext("2d");
  target.fillStyle = shades.canvas;
  target.fillRect(0, 0, image.width, image.height);
  drawBelow(target, ratio);
  drawAbove(target, ratio);
  target.setTransform(ratio, 0, 0, ratio, 0, 0);
  target.globalAlpha = 1;
  target.fillStyle = shades.canvas;
  target.fillRect(0, view.height, view.width, foot);
  target.fillStyle = shades.soft;
  target.font = `11px ${FONT}`;
  target.textAlign = "left";
  target.textBaseline = "middle";
  const words = document.querySelector("footer").textContent;
  target.fillText(`${words} · ${el("count").textContent}`, 12, view.height + foot / 2, view.width - 24);
  image.toBlob((blob) => {
    const address = URL.createObjectURL(blob);
    make("a", { href: address, download: "circuit.png" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
}
