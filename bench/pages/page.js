"use strict";
// Figures say the value under the mouse, the finger or, by arrow keys, of one point after another.
document.querySelectorAll("figure.chart").forEach(watch);

function watch(figure, place) {
  const plot = figure.querySelector(".plot");
  const [dot, tip, said] = [".dot", ".tip", ".said"].map((one) => figure.querySelector(one));
  let parsed = null; // of a long run this takes a while: once it is looked at
  let at = null; // series and point that are shown
  const data = () => (parsed ??= JSON.parse(figure.querySelector(":scope > script").textContent));
  if (place === 0) {
    said.dataset.hint = "To read values, in all figures: hover, tap, or Tab and the arrow keys.";
  }

  function view() {
    const svg = [...plot.children].find((one) => getComputedStyle(one).display !== "none");
    const box = svg.getBoundingClientRect(), outer = plot.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const places = data()[svg.classList[0]]; // wide or narrow
    return {
      box, scale, left: box.left - outer.left, top: box.top - outer.top,
      count: (s) => places[s].length / 2,
      place: (s, i) => [places[s][2 * i], places[s][2 * i + 1]],
    };
  }

  function show(s, i) {
    const { scale, left, top, place } = view();
    const [x, y] = place(s, i), { name, texts } = data().series[s];
    at = [s, i];
    said.textContent = tip.textContent = name ? `${name}, ${texts[i]}` : texts[i];
    dot.hidden = tip.hidden = false;
    const px = left + x * scale, py = top + y * scale;
    dot.style.translate = `${px}px ${py}px`;
    tip.style.translate = "0 0"; // its own width first, at most that of the plot
    const aside = Math.min(px - tip.offsetWidth / 2, plot.clientWidth - tip.offsetWidth);
    const above = py - tip.offsetHeight - 12;
    tip.style.translate = `${Math.max(0, aside)}px ${above < 0 ? py + 14 : above}px`;
  }

  function hide() {
    at = null;
    dot.hidden = tip.hidden = true;
    said.textContent = "";
  }

  // The point nearest to x, y; without y, to x. Among one series, if that is given.
  function nearest(x, y, only) {
    const { count, place } = view();
    let best = null, least = Infinity;
    data().series.forEach((_, s) => {
      for (let i = 0; i < count(s) && (only === undefined || s === only); i++) {
        const [px, py] = place(s, i);
        const far = Math.hypot(px - x, y === undefined ? 0 : py - y);
        if (far < least) [best, least] = [[s, i], far];
      }
    });
    return best;
  }

  function point(event) {
    const { box, scale } = view();
    const found = nearest((event.clientX - box.left) / scale, (event.clientY - box.top) / scale);
    if (found) show(...found);
  }

  function moved(key) {
    const { count, place } = view();
    const some = data().series.map((_, s) => s).filter((s) => count(s));
    if (!some.length) return null;
    const [s, i] = at ?? [some[0], key === "ArrowLeft" ? count(some[0]) : -1];
    const last = count(s) - 1;
    if (key === "ArrowRight") return [s, Math.min(i + 1, last)];
    if (key === "ArrowLeft") return [s, Math.max(i - 1, 0)];
    if (key === "Home") return [s, 0];
    if (key === "End") return [s, last];
    if (!at) return [s, 0];
    const next = some[some.indexOf(s) + (key === "ArrowDown" ? 1 : -1)] ?? s;
    return next === s ? at : nearest(place(s, i)[0], undefined, next);
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (event.target !== figure || event.ctrlKey || event.altKey || event.metaKey) return;
    if (!/^(Arrow|Home$|End$)/.test(event.key)) return;
    event.preventDefault();
    const next = moved(event.key);
    if (next) show(...next);
  });
  addEventListener("resize", () => at && show(...at));
}
