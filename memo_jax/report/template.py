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
<footer>Written by memo-jax {version}. This page holds all it shows.</footer>
<script>{script}</script>
</body>
</html>
"""

STYLE_SHEET = """
:root { --ink: #222; --muted: #6b6b6b; --line: #e3e3e3; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #f5f6f7;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { margin: 0; font-size: 30px; }
header p { margin: 2px 0 18px; color: var(--muted); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.card { flex: 1 1 170px; padding: 14px 16px; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  border-top: 4px solid var(--blue); display: flex; flex-direction: column; }
.card.plain { border-top-color: #b9b9b9; }
.card b { font-size: 25px; line-height: 1.2; }
.card small { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 16px 0 4px; }
nav a { color: var(--blue); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin: 18px 0; padding: 20px 24px 24px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 22px 0 8px; font-size: 16px; }
p { max-width: 75ch; }
figure { margin: 14px 0 0; }
img { display: block; max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 7px 12px 7px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.facts th { width: 150px; color: var(--muted); font-weight: 500; }
.rates td, .rates thead th { text-align: right; font-variant-numeric: tabular-nums; }
.rates thead th { color: var(--muted); font-weight: 500; }
.trials td { vertical-align: middle; }
.score { width: 90px; font-size: 18px; font-variant-numeric: tabular-nums; }
.score small { display: block; font-size: 12px; color: var(--muted); }
code { font-size: 13px; overflow-wrap: anywhere; }
audio { display: block; width: 100%; max-width: 380px; height: 34px; margin-top: 4px; }
.note { padding: 10px 14px; background: #fff8e6; border-left: 4px solid #b07a00; }
footer { padding: 8px 24px 40px; color: var(--muted); font-size: 13px; }
"""

SCRIPT = """
const players = [...document.querySelectorAll("audio")];
for (const one of players)
  one.addEventListener("play", () => players.forEach(other => other !== one && other.pause()));
"""
