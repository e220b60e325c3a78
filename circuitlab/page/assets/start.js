// Start: pointer, keys, buttons; then the first picture.
function pointers() {
  const held = new Map();
  let dragged = false, apart = 0;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, at(event));
    dragged = false;
    apart = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (!held.has(event.pointerId)) return hover(x, y);
    const [fromX, fromY] = held.get(event.pointerId);
    if (!dragged && Math.hypot(x - fromX, y - fromY) < 4) return;
    dragged = true;
    canvas.classList.add("moving");
    held.set(event.pointerId, [x, y]);
    if (held.size === 2) {
      const [[ax, ay], [bx, by]] = [...held.values()];
      const now = Math.hypot(ax - bx, ay - by);
      if (apart) zoom(now / apart, (ax + bx) / 2, (ay + by) / 2);
      apart = now;
      return;
    }
    view.x += x - fromX;
    view.y += y - fromY;
    el("tip").hidden = true;
    move();
  });
  const release = (event) => {
    held.delete(event.pointerId);
    canvas.classList.remove("moving");
  };
  canvas.addEventListener("pointerup", (event) => {
    if (!dragged && held.size === 1) select(under(...at(event)));
    release(event);
  });
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { el("tip").hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    // In a report the wheel turns the pages; there it zooms with a key held, or once chosen.
    if (!document.documentElement.classList.contains("whole") && !event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 18 : 1;
    zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY * lines)) * 0.0035), ...at(event));
  }, { passive: false });
}

let hovering = false;
function hover(x, y) {
  if (hovering) return;
  hovering = true;
  requestAnimationFrame(() => {
    hovering = false;
    const found = under(x, y), tip = el("tip");
    canvas.classList.toggle("over", Boolean(found));
    tip.hidden = !found;
    if (!found) return;
    tip.textContent = found.node !== undefined ? nodes[found.node].tip : `${edgeName(found.edge)}  ${figures(edges.score[found.edge], signed)}`;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, view.width - box.width - 6)) + "px";
    tip.style.top = Math.max(4, y + box.height + 22 > view.height ? y - box.height - 10 : y + 16) + "px";
  });
}

/** Follow the strongest shown edge upwards (1) or downwards (-1). */
function walk(direction) {
  if (selected.edge !== null) return go(direction > 0 ? edges.target[selected.edge] : edges.source[selected.edge]);
  if (selected.node === null) return go(end(direction > 0 ? "input" : "logits"));
  const [list, ends] = direction > 0 ? [outgoing, edges.target] : [incoming, edges.source];
  const edge = list[selected.node].find((candidate) => shownSet.has(candidate));
  if (edge !== undefined) go(ends[edge]);
}

function end(kind) {
  const found = [...shownNodes].find((index) => nodes[index].kind === kind);
  return found ?? [...shownNodes][0];
}

/** The next component of the row, to the left (-1) or right (1). */
function beside(direction) {
  if (selected.node === null) return go(end("input"));
  const [x, y] = place(selected.node);
  const row = [...shownNodes].filter((index) => Math.abs(place(index)[1] - y) < 4 && (place(index)[0] - x) * direction > 0);
  row.sort((a, b) => direction * (place(a)[0] - place(b)[0]));
  if (row.length) go(row[0]);
}

function go(index) {
  if (index === undefined) return;
  select({ node: index });
  reveal(index);
}

const KEYS = {
  ArrowUp: () => walk(1), ArrowDown: () => walk(-1), ArrowLeft: () => beside(-1), ArrowRight: () => beside(1),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), f: fit,
  "/": () => { openFilters(true); el("search").focus(); el("search").select(); },
  "?": () => el("keys").showModal(),
  Enter: () => { if (selected.node !== null || selected.edge !== null) card.focus(); },
};

function keys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || el("keys").open) return;
    const where = document.activeElement;
    const typing = where.matches?.("input:not([type=checkbox]):not([type=radio]), textarea");
    if (event.key === "Escape") {
      openFilters(false);
      select(null);
      return canvas.focus({ preventScroll: true });
    }
    if (typing) return;
    const onCanvas = where === canvas || (where === document.body && document.documentElement.classList.contains("whole"));
    const act = KEYS[event.key];
    if (!act || (/^(Arrow|Enter)/.test(event.key) && !onCanvas)) return;
    event.preventDefault();
    act();
  });
}

function searching() {
  const search = el("search");
  const update = () => {
    choice.query = search.value;
    choose();
    listComponents();
    redraw();
  };
  search.addEventListener("input", update);
  search.addEventListener("keydown", (event) => {
    const first = el("components").querySelector("button");
    if (event.key === "Enter" && first) {
      event.stopPropagation();
      first.click();
      canvas.focus({ preventScroll: true });
    } else if (event.key === "ArrowDown" && first) {
      event.preventDefault();
      first.focus();
    } else if (event.key === "Escape" && search.value) {
      event.stopPropagation();
      search.value = "";
      update();
    }
  });
  el("components").addEventListener("keydown", (event) => {
    const rows = [...el("components").querySelectorAll("button")];
    const next = rows.indexOf(document.activeElement) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (Number.isNaN(next)) return;
    event.preventDefault();
    event.stopPropagation();
    (next < 0 ? search : rows[Math.min(next, rows.length - 1)]).focus();
  });
}

function openFilters(open) {
  el("filters").classList.toggle("open", open);
  el("to-filters").setAttribute("aria-expanded", String(open));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  el("to-theme").textContent = name === "dark" ? "Light" : "Dark";
  readShades();
  // Pictures in the card take their colours when they are made.
  select(selected.node !== null ? { node: selected.node } : selected.edge !== null ? { edge: selected.edge } : null);
  redraw();
}

function buttons() {
  el("closer").addEventListener("click", () => zoom(1.25));
  el("farther").addEventListener("click", () => zoom(0.8));
  el("fit").addEventListener("click", fit);
  el("to-image").addEventListener("click", saveImage);
  // A frame without that right could not save a file.
  el("to-image").hidden = window.parent !== window;
  el("to-keys").addEventListener("click", () => el("keys").showModal());
  el("to-filters").addEventListener("click", () => openFilters(!el("filters").classList.contains("open")));
  el("to-theme").addEventListener("click", () => {
    chosen = true;
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  });
}

let chosen = false;
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function start() {
  const { verdict, reason } = data.about;
  if (verdict) {
    const chip = el("verdict");
    chip.hidden = false;
    chip.textContent = verdict;
    chip.title = reason || "by the analysis's own check";
    if (/^(established|supported)/.test(verdict)) chip.classList.add("good");
    if (/^not (established|supported)/.test(verdict)) chip.classList.add("bad");
  }
  nodes.forEach((node, index) => { node.detailRole = data.details[index]?.role; });
  choose();
  buildSieve();
  buildLegend();
  refresh();
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { if (!chosen) theme(dark.matches ? "dark" : "light"); });
  pointers();
  keys();
  searching();
  buttons();
  new ResizeObserver(resize).observe(el("stage"));
  resize();
}

start();
