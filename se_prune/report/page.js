"use strict";
(() => {
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const PLACES = ["x", "y", "cx", "cy", "x1", "x2", "y1", "y2"];
  const minus = (text) => text.replace("-", "−");

  // ---- tips ----
  function show(text, left, top) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const x = Math.max(4, Math.min(left + 14, innerWidth - box.width - 8));
    const y = top - box.height - 12 < 4 ? top + 18 : top - box.height - 12;
    tip.style.transform = `translate(${x}px, ${y}px)`;
  }
  const hide = () => { tip.hidden = true; };

  // ---- one figure: its view, its curves, the place of the keyboard ----
  const known = new WeakMap();
  function state(figure) {
    if (!known.has(figure)) {
      const pair = (name) => figure.dataset[name].split(" ").map(Number);
      const [x, y] = [pair("x"), pair("y")];
      known.set(figure, {
        x, y, view: {x: [0, 1], y: [0, 1]}, curves: null, at: -1,
        grain: Number(figure.dataset.grain), zoom: figure.dataset.zoom,
        units: figure.dataset.units.split("|"), lines: figure.querySelector(".lines"),
      });
    }
    return known.get(figure);
  }

  function curves(figure) {  // the points of each line, read back from its path: steps from the point before
    const own = state(figure);
    own.curves ??= [...own.lines.querySelectorAll(".curve")].map((path) => {
      let [x, y] = [0, 0];
      const numbers = (path.getAttribute("d").match(/-?\d+/g) ?? []).map(Number);
      const points = [];
      for (let i = 0; i + 1 < numbers.length; i += 2) {
        x += numbers[i]; y += numbers[i + 1];
        points.push([x, y]);
      }
      return {path, points, name: path.dataset.name, choice: path.dataset.class};
    });
    return own.curves;
  }

  const value = (own, step) => own.y[1] - step / 1000 * (own.y[1] - own.y[0]);

  function nearest(points, x) {
    let [low, high] = [0, points.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? low : high;
  }

  function place(figure, point) {  // where a point of a curve is on the screen
    const own = state(figure);
    const box = figure.getBoundingClientRect();
    const fx = (point[0] * own.grain - own.x[0]) / (own.x[1] - own.x[0]);
    const fy = point[1] / 1000;
    const {x, y} = own.view;
    return [box.left + box.width * (fx - x[0]) / (x[1] - x[0]), box.top + box.height * (fy - y[0]) / (y[1] - y[0])];
  }

  function reachable(figure) {  // lines that hovering finds: all, or the one that is brought forward and the mean
    const chosen = figure.dataset.chosen;
    return curves(figure).filter((c) => c.points.length &&
      (chosen === undefined || c.choice === undefined || c.choice === chosen));
  }

  function mark(figure, curve, index) {
    const own = state(figure);
    const [left, top] = place(figure, curve.points[index]);
    const box = figure.getBoundingClientRect();
    let spot = figure.querySelector(".spot");
    if (!spot) {
      spot = document.createElementNS(SVG, "circle");
      spot.setAttribute("class", "spot");
      spot.setAttribute("r", "4.5");
      figure.append(spot);
    }
    spot.setAttribute("cx", left - box.left);
    spot.setAttribute("cy", top - box.top);
    const [across, up] = own.units;
    const number = minus(value(own, curve.points[index][1]).toFixed(3));
    show(`${curve.name}\n${across} ${Math.round(curve.points[index][0] * own.grain)}: ${up} ${number}`, left, top);
  }

  function hover(figure, event) {
    const target = event.target.closest("[data-tip]");
    if (target) return show(target.dataset.tip, event.clientX, event.clientY);
    const own = state(figure);
    if (!own.units[0]) return hide();
    const box = figure.getBoundingClientRect();
    const {x} = own.view;
    const fraction = x[0] + (event.clientX - box.left) / box.width * (x[1] - x[0]);
    const wanted = (own.x[0] + fraction * (own.x[1] - own.x[0])) / own.grain;
    let best = null;
    for (const curve of reachable(figure)) {
      const index = nearest(curve.points, wanted);
      const distance = Math.abs(place(figure, curve.points[index])[1] - event.clientY);
      if (!best || distance < best.distance) best = {curve, index, distance};
    }
    if (best) mark(figure, best.curve, best.index);
  }

  function leave(figure) {
    hide();
    figure.querySelector(".spot")?.remove();
  }

  // ---- zoom ----
  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 5, 10].find((f) => size * f >= raw * 0.95);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
      found.push([i * step, minus((i * step).toFixed(digits))]);
    }
    return found;
  }

  function look(figure, view) {  // show a part of the plot: fractions of the whole, from the left and the top
    const own = state(figure);
    own.view = view;
    const [x, y] = [view.x, view.y];
    const width = (own.x[1] - own.x[0]) / own.grain;
    own.lines.setAttribute("viewBox", [own.x[0] / own.grain + x[0] * width, 1000 * y[0],
      (x[1] - x[0]) * width, 1000 * (y[1] - y[0])].join(" "));
    for (const element of figure.querySelectorAll(".marks *")) {
      for (const name of PLACES) {
        if (!element.hasAttribute(name)) continue;
        element.dataset[`at${name}`] ??= parseFloat(element.getAttribute(name)) / 100;
        const along = name.includes("x") ? x : y;
        const moved = (Number(element.dataset[`at${name}`]) - along[0]) / (along[1] - along[0]);
        element.setAttribute(name, `${100 * moved}%`);
      }
      const own_x = parseFloat(element.getAttribute("cx") ?? element.getAttribute("x") ?? element.getAttribute("x1"));
      const own_y = parseFloat(element.getAttribute("cy") ?? element.getAttribute("y") ?? "50");
      element.style.visibility = own_x < -0.5 || own_x > 100.5 || own_y < -0.5 || own_y > 100.5 ? "hidden" : "";
    }
    relabel(figure, "x", x);
    if (own.zoom === "xy") relabel(figure, "y", y);
    figure.dataset.zoomed = x[1] - x[0] < 0.999 || y[1] - y[0] < 0.999 ? "yes" : "no";
    leave(figure);
  }

  function relabel(figure, name, part) {
    const own = state(figure);
    const axis = own[name];
    const group = figure.querySelector(`.ticks-${name}`);
    own[`whole-${name}`] ??= group.innerHTML;
    if (part[1] - part[0] > 0.999) { group.innerHTML = own[`whole-${name}`]; return; }
    const span = axis[1] - axis[0];
    const [low, high] = name === "x" ? [axis[0] + part[0] * span, axis[0] + part[1] * span]
      : [axis[1] - part[1] * span, axis[1] - part[0] * span];
    group.replaceChildren(...ticks(low, high, name === "x" ? 8 : 5).map(([at, label]) => {
      const text = document.createElementNS(SVG, "text");
      const fraction = (at - low) / (high - low);
      const places = name === "x" ? {x: `${100 * fraction}%`, y: "100%", dy: "1.4em", "text-anchor": "middle"}
        : {x: "0%", y: `${100 * (1 - fraction)}%`, dx: "-8", dy: ".32em", "text-anchor": "end"};
      for (const [key, of] of Object.entries(places)) text.setAttribute(key, of);
      text.textContent = label;
      return text;
    }));
  }

  function closer(figure, factor, centre) {
    const own = state(figure);
    const part = ([low, high], at) => {
      const width = Math.min(1, Math.max(0.01, (high - low) / factor));
      const start = Math.min(1 - width, Math.max(0, at - width / 2));
      return [start, start + width];
    };
    const middle = ([low, high]) => (low + high) / 2;
    const {x, y} = own.view;
    look(figure, {x: part(x, centre ?? middle(x)), y: own.zoom === "xy" ? part(y, middle(y)) : y});
  }

  const whole = (figure) => look(figure, {x: [0, 1], y: [0, 1]});

  function drag(figure, event) {
    const own = state(figure);
    if (!own.zoom || event.pointerType !== "mouse" || event.button !== 0) return;
    const box = figure.getBoundingClientRect();
    const start = [event.clientX, event.clientY];
    const shade = document.createElementNS(SVG, "rect");
    shade.setAttribute("class", "shade");
    const range = (e, i) => {
      const [edge, size] = i ? [box.top, box.height] : [box.left, box.width];
      if (i && own.zoom !== "xy") return [0, 1];
      const ends = [start[i], i ? e.clientY : e.clientX].map((p) => Math.min(1, Math.max(0, (p - edge) / size)));
      return ends.sort((a, b) => a - b);
    };
    const move = (e) => {
      const [x, y] = [range(e, 0), range(e, 1)];
      if (!shade.parentNode) figure.append(shade);
      shade.setAttribute("x", `${100 * x[0]}%`);
      shade.setAttribute("width", `${100 * (x[1] - x[0])}%`);
      shade.setAttribute("y", `${100 * y[0]}%`);
      shade.setAttribute("height", `${100 * (y[1] - y[0])}%`);
    };
    const end = (e) => {
      removeEventListener("pointermove", move);
      shade.remove();
      const [x, y] = [range(e, 0), range(e, 1)];
      if ((x[1] - x[0]) * box.width < 8 || (y[1] - y[0]) * box.height < 8) return;
      const into = (part, view) => part.map((f) => view[0] + f * (view[1] - view[0]));
      look(figure, {x: into(x, own.view.x), y: into(y, own.view.y)});
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end, {once: true});
    event.preventDefault();
  }

  // ---- keyboard ----
  function step(figure, by) {
    const own = state(figure);
    if (own.units[0]) {
      const lines = reachable(figure);
      const curve = lines.find((c) => c.choice !== undefined && c.choice === figure.dataset.chosen) ?? lines.at(-1);
      if (!curve) return;
      own.at = Math.min(curve.points.length - 1, Math.max(0, own.at + by));
      mark(figure, curve, own.at);
      return;
    }
    const tipped = [...figure.querySelectorAll("[data-tip]")];
    if (!tipped.length) return;
    own.at = Math.min(tipped.length - 1, Math.max(0, own.at + by));
    const box = tipped[own.at].getBoundingClientRect();
    show(tipped[own.at].dataset.tip, box.left + box.width / 2, box.top);
  }

  function key(figure, event) {
    const own = state(figure);
    const actions = {
      ArrowRight: () => step(figure, 1), ArrowLeft: () => step(figure, -1),
      Escape: () => (own.zoom ? whole(figure) : leave(figure)),
    };
    if (own.zoom) Object.assign(actions, {"+": () => closer(figure, 2), "-": () => closer(figure, 0.5)});
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    actions[event.key]();
    event.preventDefault();
  }

  for (const figure of document.querySelectorAll("svg.figure")) {
    figure.addEventListener("pointermove", (event) => hover(figure, event));
    figure.addEventListener("pointerleave", () => leave(figure));
    figure.addEventListener("pointerdown", (event) => drag(figure, event));
    figure.addEventListener("dblclick", () => state(figure).zoom && whole(figure));
    figure.addEventListener("keydown", (event) => key(figure, event));
    figure.addEventListener("blur", () => leave(figure));
  }

  // ---- controls ----
  const figuresOf = (control) => [...document.getElementById(control.dataset.figure).querySelectorAll("svg.figure")];
  document.querySelectorAll("button[data-zoom]").forEach((button) => {
    const by = {in: 2, out: 0.5}[button.dataset.zoom];
    button.addEventListener("click", () => figuresOf(button).forEach((f) => (by ? closer(f, by) : whole(f))));
  });
  document.querySelectorAll("select[data-figure]").forEach((select) => {
    const pick = () => document.getElementById(select.dataset.figure).querySelectorAll(".panel").forEach((panel, i) => {
      panel.hidden = i !== Number(select.value);
    });
    pick();
    select.addEventListener("change", pick);
  });

  function spread(figure, curve) {  // the band of one standard deviation within a class, around its line
    const bytes = Uint8Array.from(atob(curve.path.dataset.spread), (c) => c.charCodeAt(0));
    const half = (i) => bytes[i] / 255 * 500;
    const at = (i, sign) => `${curve.points[i][0]} ${curve.points[i][1] + sign * half(i)}`;
    const order = curve.points.map((_, i) => i);
    const band = document.createElementNS(SVG, "path");
    band.setAttribute("class", "spread");
    band.setAttribute("d", `M${order.map((i) => at(i, -1)).join("L")}L${order.reverse().map((i) => at(i, 1)).join("L")}z`);
    band.style.fill = curve.path.style.stroke;
    return band;
  }

  document.querySelectorAll("button[data-class]").forEach((button) => {
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.closest("ul").querySelectorAll("button").forEach((other) => {
        other.setAttribute("aria-pressed", String(pressed && other === button));
      });
      for (const figure of figuresOf(button)) {
        figure.querySelector(".spread")?.remove();
        if (pressed) figure.dataset.chosen = button.dataset.class; else delete figure.dataset.chosen;
        for (const curve of curves(figure)) {
          const forward = pressed && curve.choice === button.dataset.class;
          curve.path.classList.toggle("forward", forward);
          const whole = forward && curve.path.dataset.spread &&
            atob(curve.path.dataset.spread).length === curve.points.length;
          if (whole) state(figure).lines.prepend(spread(figure, curve));
        }
        leave(figure);
      }
    });
  });

  // ---- print ----
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((item) => {
    item.open = true;
    item.dataset.opened = "";
  }));
  addEventListener("afterprint", () => document.querySelectorAll("details[data-opened]").forEach((item) => {
    item.open = false;
    delete item.dataset.opened;
  }));
  document.documentElement.dataset.ready = "yes";
})();
