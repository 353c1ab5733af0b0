// Every text that is shown (or every field's edge) against what is behind it, by WCAG's formula: [[ratio, which], ...].
// Disabled controls are exempt there.
(what) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const v = color[i] / 255;
    return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ratio = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
    return (bright + 0.05) / (dark + 0.05);
  };
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const shown = (node) => node.checkVisibility({ visibilityProperty: true })
    && !node.closest(".unseen, :disabled, label:has(:disabled)");
  const found = [];
  const measure = (color, below, name) => found.push([ratio(over(rgba(color), below), below), name.trim().slice(0, 40)]);

  if (what === "edges") {
    const fields = "input[type=number], input[type=password], select, textarea:not(#prompt), .box, .choice";
    for (const field of [...document.querySelectorAll(fields)].filter(shown)) {
      measure(getComputedStyle(field).borderTopColor, behind(field.parentElement), field.id);
    }
    return found;
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { parentElement: node, data } = walker.currentNode;
    if (data.trim() && shown(node)) measure(getComputedStyle(node).color, behind(node), data);
  }
  for (const field of [...document.querySelectorAll("input, textarea")].filter(shown)) {
    if (field.placeholder) measure(getComputedStyle(field, "::placeholder").color, behind(field), field.placeholder);
  }
  return found;
}
