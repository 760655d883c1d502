"""Style and script of the page, inside it: nothing is loaded from anywhere."""

import base64
import hashlib

from poprisk_integrations.cli.report.palette import DARK, LIGHT

__all__ = ["CONTENT_POLICY", "SCRIPT", "STYLE"]


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_THEMES = f"""
:root{{color-scheme:light;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{
:root:not([data-theme=light]){{color-scheme:dark;{_variables(DARK)}}}}}
:root[data-theme=dark]{{color-scheme:dark;{_variables(DARK)}}}
"""

STYLE = (
    _THEMES
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
a{color:var(--link)}
a:focus-visible,button:focus-visible,summary:focus-visible,[tabindex]:focus-visible{
outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-999rem;top:0;padding:.5rem 1rem;background:var(--card);z-index:1}
.skip:focus{left:.5rem}
header,main,footer{max-width:84rem;margin:0 auto;padding:0 1.25rem}
header{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;align-items:baseline;padding-top:1.25rem}
h1{font-size:1.5rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.25rem 0 .75rem}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
nav{flex-basis:100%}
nav ul{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;list-style:none;margin:.25rem 0 0;padding:0}
nav a{display:inline-block;padding:.2rem 0}
button{font:inherit;font-size:.9rem;color:var(--ink);background:var(--card);cursor:pointer;
border:1px solid var(--muted);border-radius:.4rem;padding:.3rem .75rem;margin-left:auto}
.headline{font-size:1.15rem;font-weight:600;margin:.25rem 0 .5rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.85rem 1rem;margin:0 0 1rem}
.card ul{margin:.25rem 0;padding-left:1.2rem}
.card li{margin:.2rem 0;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 1rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem 1rem;
margin:0 0 1rem}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.5rem .75rem}
.figures dt{color:var(--muted);font-size:.85rem}
.figures dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(22.5rem,1fr));gap:1rem}
figure{margin:0;min-width:0;background:var(--card);border:1px solid var(--line);
border-radius:.6rem;padding:.75rem .75rem .5rem;display:flex;flex-direction:column}
.chart{display:block;width:100%;height:auto;margin-top:.35rem;border-radius:.25rem}
.chart *{stroke-linejoin:round}
figcaption{color:var(--muted);font-size:.875rem;line-height:1.4;margin:.25rem 0}
figure details{margin-top:auto}
summary{cursor:pointer;padding:.2rem 0;color:var(--link);border-radius:.25rem}
figure summary{font-size:.875rem}
.scroll{overflow-x:auto;border-radius:.25rem}
figure .scroll{max-height:18rem;overflow-y:auto}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding:.2rem 0 .4rem}
th,td{text-align:left;padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--line);
white-space:nowrap;vertical-align:top}
tbody th{font-weight:500}
footer{color:var(--muted);font-size:.875rem;padding-top:1.5rem;padding-bottom:2rem}
footer p,main p{max-width:56rem;overflow-wrap:anywhere}
@media (max-width:700px){header,main,footer{padding-left:.75rem;padding-right:.75rem}
.charts{grid-template-columns:minmax(0,1fr)}
.figures{grid-template-columns:repeat(2,minmax(0,1fr))}
h1{font-size:1.25rem}figure{padding-left:.5rem;padding-right:.5rem}}
@media print{button,nav,.skip{display:none}figure,.card{break-inside:avoid}}
"""
)

# Without it the page follows the system's theme, and lacks the button only.
SCRIPT = """
(function () {
  "use strict";
  var root = document.documentElement, button = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)"), kept = null;
  try { kept = localStorage.getItem("poprisk-theme"); } catch (e) { kept = null; }
  if (kept === "dark" || kept === "light") { root.dataset.theme = kept; }
  function isDark() {
    return (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  }
  function label() { button.textContent = isDark() ? "Light colours" : "Dark colours"; }
  button.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("poprisk-theme", root.dataset.theme); } catch (e) { kept = null; }
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
})();
"""

_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# The page loads nothing and runs this one script, whatever text a log holds.
CONTENT_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'; "
    "base-uri 'none'; form-action 'none'"
)
