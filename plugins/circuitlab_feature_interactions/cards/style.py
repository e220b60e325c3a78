"""Style: the style sheet of the page, light, dark and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --rule: #ddd; --page: #fff;
  --card: #fafafa; --hot: 213, 94, 0; --less: 0, 114, 178; --more: 0, 158, 115; --bar: #0072b2;
  --null: #999; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #a0a0a0; --rule: #383838;
  --page: #151515; --card: #1d1d1d; --hot: 240, 128, 40; --less: 86, 160, 220;
  --more: 40, 190, 145; --bar: #56b4e9; --null: #777; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 2rem 1.5rem 4rem; background: var(--page);
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; font-weight: 600; margin: 0; }
h3 { font-size: .75rem; font-weight: 600; color: var(--soft); margin: 1.1rem 0 .3rem; }
p { margin: .3rem 0; max-width: 62rem; }
.soft { color: var(--soft); }
.warning { border-left: 3px solid rgb(var(--hot)); padding-left: .7rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1.5rem 0;
  break-inside: avoid; }
.card { border: 1px solid var(--rule); border-radius: 6px; padding: 1rem 1.1rem;
  background: var(--card); min-width: 0; }
.card.control { border-style: dashed; }
.card header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; }
.kind { color: var(--soft); font-size: .8rem; }
.strip { font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; margin: .15rem 0;
  overflow-wrap: anywhere; }
.strip span { display: inline-block; max-width: 100%; white-space: pre-wrap; line-height: 1.35;
  border-radius: 3px; padding: .05em .2em; margin-right: 1px; }
.strip .hot { background: rgba(var(--hot), var(--a)); }
.strip .less { background: rgba(var(--less), var(--a)); }
.strip .more { background: rgba(var(--more), var(--a)); }
.strip .here { outline: 1.5px solid var(--ink); outline-offset: -1px; }
.strip .none { color: var(--soft); }
.row { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .6rem; align-items: baseline;
  border-top: 1px solid var(--rule); padding: .15rem 0; }
.row .name { color: var(--soft); font-size: .75rem; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 64px; }
svg rect { fill: var(--bar); }
.control svg rect { fill: var(--null); }
svg line { stroke: var(--rule); }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .7rem; }
@media (max-width: 60rem) { .pair { grid-template-columns: 1fr; } }
@media print { body { padding: 0; font-size: 10px; } .strip { font-size: 9px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
