"""How the report page looks: its HTML frame, style sheet and script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><p>{step}</p><div class="cards">{cards}</div><nav>{links}</nav></header>
<main>{body}</main>
<footer>Written by memo-jax {version}. This page is self-contained.</footer>
<script>{script}</script>
</body>
</html>
"""

STYLE_SHEET = """
:root { --page: #f5f6f7; --line: #e3e3e3; --note: #fff8e6; }
@media (prefers-color-scheme: dark) { :root { --page: #111316; --line: #33383e; --note: #2b2617; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--page); overflow-wrap: break-word;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { margin: 0; font-size: 30px; line-height: 1.25; }
header p { margin: 2px 0 18px; color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; }
.card { padding: 14px 16px; background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
  border-top: 4px solid var(--faint); display: flex; flex-direction: column; }
.card b { font-size: 25px; line-height: 1.2; }
.card small { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 16px 0 4px; }
nav a { color: var(--blue); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin: 18px 0; padding: 20px 24px 24px; background: var(--surface); border: 1px solid var(--line);
  border-radius: 10px; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 22px 0 8px; font-size: 16px; }
p { max-width: 85ch; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 6px; line-height: 1.35; }
figcaption b { display: block; font-weight: 600; }
figcaption span { display: block; color: var(--muted); font-size: 13px; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart * { stroke-linejoin: round; stroke-linecap: butt; }
.chart text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important;
  paint-order: stroke; stroke: var(--surface); stroke-width: 2.5px; }
.swatch { display: inline-block; width: 30px; height: 8px; margin-right: 9px; vertical-align: 1px; }
.swatch path { stroke-width: 2.5; fill: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 26px 28px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px;
  margin-top: 24px; }
.tall { grid-row: span 2; }
.narrow { display: none; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 7px 12px 7px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.facts th { width: 150px; color: var(--muted); font-weight: 500; }
.facts td { overflow-wrap: anywhere; }
.rates td, .rates thead th { text-align: right; font-variant-numeric: tabular-nums; }
.rates thead th { color: var(--muted); font-weight: 500; }
.rates tr > :last-child { padding-right: 0; }
.trials td { vertical-align: middle; }
.score { width: 90px; font-size: 18px; font-variant-numeric: tabular-nums; }
.score small { display: block; font-size: 12px; color: var(--muted); }
code { font-size: 13px; overflow-wrap: anywhere; }
audio { display: block; width: 100%; max-width: 420px; height: 34px; margin-top: 4px; }
.note { padding: 10px 14px; background: var(--note); border-left: 4px solid var(--orange); }
footer { padding: 8px 24px 40px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px 14px 18px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
  .wide { display: none; }
  .narrow { display: block; }
  .pictures .chart text { font-size: 10.5px !important; }
  table, tbody, tr, th, td { display: block; width: auto !important; }
  thead { display: none; }
  th, td { padding: 0; border: 0; }
  tr { padding: 9px 0; border-bottom: 1px solid var(--line); }
  .rates td { display: flex; justify-content: space-between; }
  .rates td::before { content: attr(data-column); color: var(--muted); }
  .trials td + td { margin-top: 8px; }
  .score small { display: inline; margin-left: 8px; }
  audio { max-width: none; }
}
"""

SCRIPT = """
const players = [...document.querySelectorAll("audio")];
for (const one of players)
  one.addEventListener("play", () => players.forEach(other => other !== one && other.pause()));
"""
