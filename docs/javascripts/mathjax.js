// Before MathJax itself, which `docs/formulas.py` puts beside this file. Nothing is loaded later: no menu, no extensions.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    packages: { "[-]": ["require", "autoload"] },
  },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
};
