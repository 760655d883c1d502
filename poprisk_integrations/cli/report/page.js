// Without it the page follows the system's theme, and lacks the button only.
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
