"""The page's style sheet."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #fff; --ink: #1b1d21; --muted: #5d636d; --line: #dcdcd6;
  --blue: #0072b2; --orange: #d55e00; --green: #009e73; --purple: #b0568a; --sky: #56b4e9; --yellow: #e69f00;
  --good: #00704f; --warn: #8a5a00; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e23; --ink: #e8e9eb; --muted: #a0a7b2; --line: #343941;
    --blue: #56b4e9; --orange: #f28c3c; --green: #2fc79b; --purple: #d993b9; --sky: #9ad3f5; --yellow: #f0c04a;
    --good: #4fd0a5; --warn: #f0c04a; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere; }
header, main, footer { max-width: 1220px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { display: inline; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 8px; letter-spacing: -.01em; }
section { padding-top: 32px; }
p { margin: 0; }
.note { margin-top: -4px; color: var(--muted); max-width: 96ch; margin-bottom: 12px; }
.facts { color: var(--muted); margin: 6px 0 0; }
.state { display: inline-block; vertical-align: .3em; margin-left: 10px; padding: 1px 11px; border-radius: 99px;
  border: 1.5px solid; font-size: .85rem; font-weight: 600; }
.running { color: var(--blue); } .done { color: var(--good); } .stopped { color: var(--warn); }
.failed, .silent { color: var(--bad); }
.progress { height: 6px; border-radius: 3px; background: var(--line); margin: 16px 0; overflow: hidden; }
.progress i { display: block; height: 100%; background: var(--blue); }
.word { border-left: 4px solid var(--bad); background: var(--card); padding: 8px 14px; margin: 14px 0; white-space:
  pre-wrap; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 16px; font-size: .9rem; }
a { color: var(--blue); text-underline-offset: 3px; text-decoration-thickness: 1px; }
dl.tiles { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 10px; margin: 0; }
.tile, .panel, details, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 9px 13px 10px; min-width: 0; }
.tile dt { color: var(--muted); font-size: .8rem; }
.tile dd { margin: 0; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; letter-spacing:
  -.01em; }
.tile small { display: block; color: var(--muted); font-size: .78rem; letter-spacing: 0; min-height: 1.2em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 12px; }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); margin-top: 12px; }
figure { margin: 0; min-width: 0; }
.panel { padding: 10px 12px 6px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; margin-bottom: 4px; font-size:
  .88rem; }
figcaption small { color: var(--muted); margin-left: auto; font-variant-numeric: tabular-nums; }
.key { color: var(--muted); font-size: .82rem; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: .22em; background: currentColor; }
.key.restart::before { width: 0; height: 12px; background: none; border-left: 2px dashed var(--purple);
  border-radius: 0;
  vertical-align: -.1em; }
.key.spike::before { width: 0; height: 0; background: none; border-radius: 0; border: 5px solid transparent;
  border-top: 8px solid var(--orange); border-bottom: 0; vertical-align: .05em; }
.key.blue::before { background: var(--blue); } .key.orange::before { background: var(--orange); }
.key.green::before { background: var(--green); } .key.purple::before { background: var(--purple); }
.key.sky::before { background: var(--sky); } .key.yellow::before { background: var(--yellow); }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.narrow { display: none; }
.empty { color: var(--muted); padding: 40px 0; text-align: center; }
.map { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 9px; color: var(--muted); font-size: .85rem; }
.scale i { width: 150px; height: 12px; border: 1px solid var(--line);
  background: linear-gradient(to right, #0072b2, #0072b200 50%, #d55e0000 50%, #d55e00); }
.scale .nothing { width: 22px; background: rgb(128 128 128 / .5); margin-left: 10px; }
.panel .table { border: 0; }
.panel th, .panel td { padding: 3px 4px; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; overflow-wrap: normal; }
.number { text-align: right; }
details { margin-top: 8px; padding: 0 12px; }
summary { cursor: pointer; padding: 8px 0; font-size: .9rem; }
.folded details { margin: 0; border-radius: 0; border-bottom: 0; }
.folded details:first-child { border-radius: 8px 8px 0 0; }
.folded details:last-child { border-radius: 0 0 8px 8px; border-bottom: 1px solid var(--line); }
.folded details:only-child { border-radius: 8px; }
.folded summary { padding: 4px 0; }
details[open] { padding-bottom: 12px; }
details .table { border: 0; margin: 0; border-radius: 0; }
.experts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 3px 16px;
  font-size: .85rem; }
.experts p { display: flex; align-items: baseline; gap: 3px; }
.experts span { color: var(--muted); width: 4ch; text-align: right; margin-right: 5px; font-variant-numeric:
  tabular-nums; }
.experts i { font: .82rem ui-monospace, "Liberation Mono", monospace; min-width: 2.6ch; padding: 0 2px; text-align:
  center; border-radius: 3px;
  background: color-mix(in srgb, var(--blue) var(--s), transparent); }
.s1 { --s: 8%; } .s2 { --s: 20%; } .s3 { --s: 32%; } .s4 { --s: 46%; }
.settings { columns: 3 320px; column-gap: 28px; margin: 0; font-size: .88rem; }
.settings div { display: flex; gap: 10px; border-bottom: 1px solid var(--line); padding: 3px 0; break-inside: avoid; }
.settings dt { flex: 0 0 42%; color: var(--muted); text-align: left; }
.settings dd { margin: 0; min-width: 0; }
.settings .changed dd { color: var(--orange); font-weight: 600; }
footer { color: var(--muted); font-size: .85rem; padding-top: 36px; padding-bottom: 40px; }
@media (max-width: 1000px) { dl.tiles { grid-template-columns: repeat(auto-fill, minmax(142px, 1fr)); } }
@media (max-width: 760px) {
  .wide { display: none; }
  .narrow { display: block; }
  .maps { grid-template-columns: 1fr 1fr; }
  details tr { display: block; padding: 6px 0; border-top: 1px solid var(--line); }
  details thead { display: none; }
  details td { display: flex; gap: 10px; padding: 1px 0; border: 0; text-align: left; }
  details td::before { content: attr(data-label); flex: 0 0 42%; color: var(--muted); text-align: left; }
  header, main, footer { padding-left: 14px; padding-right: 14px; }
}
@media print { body { background: #fff; } details, .panel, .tile { break-inside: avoid; } }
"""
