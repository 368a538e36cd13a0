"use strict";
// Controls choose among drawn panels; tables, CSV and read-outs come from the same embedded numbers.
(() => {
  const fmt = (v) => v === null || v === undefined ? "–" : typeof v !== "number" ? String(v)
    : Number.isInteger(v) && Math.abs(v) < 1e12 ? v.toLocaleString("en-US") : String(+v.toPrecision(6));

  // ---- colours -----------------------------------------------------------------------------
  const themes = { auto: "as the system", light: "light", dark: "dark" };
  const button = document.getElementById("theme");
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    const root = document.documentElement;
    root.dataset.theme = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
    button.textContent = "Colours: " + themes[root.dataset.theme];
  });

  // ---- numbers -----------------------------------------------------------------------------
  const numbers = (figure) => {
    const script = figure.querySelector('.panel script[type="application/json"]');
    return script ? JSON.parse(script.textContent) : null;
  };
  const xName = (data, x) => data.names ? (data.names[Math.round(x)] ?? x) : x;

  // Rows behind a panel: wide where lines share x and have no errors, else one row a point.
  const rows = (data) => {
    if (data.kind === "heat") {
      const head = [data.y + " \\ " + data.x, ...data.columns];
      return [head, ...data.rows.map((name, i) => [name, ...data.values[i]])];
    }
    const first = data.lines[0];
    const shared = data.lines.length > 1 && data.lines.every((line) => !line.low && !line.labels &&
      line.x.length === first.x.length && line.x.every((x, i) => x === first.x[i]));
    if (shared) {
      return [[data.x, ...data.lines.map((line) => line.name)],
        ...first.x.map((x, i) => [xName(data, x), ...data.lines.map((line) => line.y[i])])];
    }
    const errors = data.lines.some((line) => line.low);
    const labels = data.lines.some((line) => line.labels);
    const head = ["series", ...(labels ? ["point"] : []), data.x, data.y,
      ...(errors ? ["low (95 %)", "high (95 %)"] : [])];
    const body = data.lines.flatMap((line) => line.x.map((x, i) => [line.name,
      ...(labels ? [line.labels ? line.labels[i] : ""] : []), xName(data, x), line.y[i],
      ...(errors ? [line.low ? line.low[i] : null, line.high ? line.high[i] : null] : [])]));
    return [head, ...body];
  };

  const fillTable = (figure) => {
    const details = figure.querySelector("details.numbers");
    const place = details.querySelector(".scroll");
    place.textContent = "";
    const data = details.open ? numbers(figure) : null;
    if (!data) return;
    const table = document.createElement("table");
    const [head, ...body] = rows(data);
    const top = table.createTHead().insertRow();
    head.forEach((name) => {
      const cell = document.createElement("th");
      cell.scope = "col"; cell.textContent = name; top.append(cell);
    });
    const tbody = table.createTBody();
    body.forEach((row) => {
      const line = tbody.insertRow();
      row.forEach((value) => { line.insertCell().textContent = fmt(value); });
    });
    place.append(table);
  };

  // ---- controls ----------------------------------------------------------------------------
  // A view that does not exist (a measure without layers, say) falls back to the nearest one.
  const choose = (figure, changed) => {
    const selects = [...figure.querySelectorAll("select[data-control]")];
    const wanted = selects.map((select) => select.value);
    const templates = [...figure.querySelectorAll("template[data-key]")];
    const score = (key) => key.reduce((sum, part, i) =>
      sum + (part === wanted[i] ? (i === changed ? 100 : 1) : 0), 0);
    const current = { key: JSON.parse(figure.dataset.key), node: null };
    const best = [current, ...templates.map((node) => ({ key: JSON.parse(node.dataset.key), node }))]
      .reduce((a, b) => score(b.key) > score(a.key) ? b : a);
    selects.forEach((select, i) => { select.value = best.key[i]; });
    if (!best.node) return;
    const panel = figure.querySelector(".panel");
    const kept = document.createElement("template");
    kept.dataset.key = figure.dataset.key;
    figure.querySelectorAll(".cursor").forEach((node) => node.remove());
    panel.querySelector(".readout")?.replaceChildren();
    kept.content.append(...panel.childNodes);
    panel.append(best.node.content);
    best.node.replaceWith(kept);
    figure.dataset.key = JSON.stringify(best.key);
    fillTable(figure);
  };

  // ---- read-outs ---------------------------------------------------------------------------
  const pixel = ([low, high, start, end, reference], v) => {
    const t = (u) => reference > 0 ? Math.log1p(u / reference) : u;
    return start + (t(v) - t(low)) / (t(high) - t(low) || 1) * (end - start);
  };
  const shownSvg = (figure) => [...figure.querySelectorAll(".panel svg")].find((svg) => svg.clientWidth > 0);

  const points = (data, scale) => {
    if (data.kind === "heat") {
      const [left, right, top, bottom] = scale.cells;
      const w = (right - left) / data.columns.length, h = (bottom - top) / data.rows.length;
      return data.values.flatMap((row, i) => row.map((v, j) => ({ x: left + (j + .5) * w,
        y: bottom - (i + .5) * h, w, h, text: `${data.y} ${data.rows[i]}, ${data.x} ${data.columns[j]}: ${fmt(v)} ${data.unit}` })));
    }
    return data.lines.flatMap((line, k) => line.x.map((x, i) => line.y[i] === null || x === null ? null : ({
      x: pixel(scale.x, x) + scale.dodge[k], y: pixel(scale.y, line.y[i]),
      text: `${line.name}${line.labels ? " · " + line.labels[i] : ""}: ${data.x} ${fmt(xName(data, x))}, ${data.y} ${fmt(line.y[i])}` +
        (line.low && line.low[i] !== null ? ` [${fmt(line.low[i])}, ${fmt(line.high[i])}]` : "") }))).filter(Boolean);
  };

  const cache = new WeakMap();
  const pointsOf = (figure, svg) => {
    if (!cache.has(svg)) cache.set(svg, points(numbers(figure), JSON.parse(svg.dataset.scale)));
    return cache.get(svg);
  };
  const show = (figure, svg, point) => {
    svg.querySelector(".cursor")?.remove();
    figure.querySelector(".readout").textContent = point ? point.text : "";
    if (!point) return;
    const shape = document.createElementNS("http://www.w3.org/2000/svg", point.w ? "rect" : "circle");
    const at = point.w ? { x: point.x - point.w / 2, y: point.y - point.h / 2, width: point.w, height: point.h }
      : { cx: point.x, cy: point.y, r: 7 };
    Object.entries(at).forEach(([name, value]) => shape.setAttribute(name, value));
    shape.setAttribute("class", "cursor");
    svg.append(shape);
  };

  document.addEventListener("pointermove", (event) => {
    const figure = event.target.closest?.(".plots")?.closest("figure");
    const svg = figure && shownSvg(figure);
    if (!svg) return;
    const box = svg.getBoundingClientRect();
    const k = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * k, y = (event.clientY - box.top) * k;
    let best = null, least = Infinity;
    for (const point of pointsOf(figure, svg)) {
      const d = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (d < least) { least = d; best = point; }
    }
    show(figure, svg, best && least < 60 ** 2 ? best : null);
  });

  document.addEventListener("keydown", (event) => {
    const plots = event.target.closest?.(".plots");
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!plots || !move) return;
    event.preventDefault();
    const figure = plots.closest("figure"), svg = shownSvg(figure);
    const all = pointsOf(figure, svg);
    const at = (Number(plots.dataset.at ?? -1) + move + all.length) % all.length;
    plots.dataset.at = at;
    show(figure, svg, all[at]);
  });

  // ---- export ------------------------------------------------------------------------------
  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
  };
  const styled = ["fill", "stroke", "stroke-width", "stroke-dasharray", "paint-order", "opacity", "font-family", "font-size", "text-anchor"];
  // A copy whose colours are written out, so that it looks the same outside this page.
  const standalone = (svg) => {
    const copy = svg.cloneNode(true);
    const from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((node, i) => {
      const style = getComputedStyle(node);
      styled.forEach((name) => { const v = style.getPropertyValue(name); if (v) to[i].setAttribute(name, v); });
      to[i].removeAttribute("style");
      if (node.tagName === "image") to[i].setAttribute("style", "image-rendering:pixelated");
    });
    copy.querySelectorAll(".cursor").forEach((node) => node.remove());
    copy.removeAttribute("data-scale");
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    const back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    back.setAttribute("width", "100%"); back.setAttribute("height", "100%");
    back.setAttribute("fill", getComputedStyle(svg.closest("figure")).backgroundColor);
    copy.prepend(back);
    return new XMLSerializer().serializeToString(copy);
  };
  const quote = (v) => v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : String(v);

  const exportFigure = (figure, kind) => {
    const name = figure.id + "." + kind;
    if (kind === "csv") {
      const text = rows(numbers(figure)).map((row) => row.map(quote).join(",")).join("\n") + "\n";
      return save(new Blob([text], { type: "text/csv" }), name);
    }
    const svg = shownSvg(figure);
    const text = standalone(svg);
    if (kind === "svg") return save(new Blob([text], { type: "image/svg+xml" }), name);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = svg.viewBox.baseVal.width * 2; canvas.height = svg.viewBox.baseVal.height * 2;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, name), "image/png");
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  };

  document.querySelectorAll("figure").forEach((figure) => {
    figure.querySelectorAll("select[data-control]").forEach((select, i) =>
      select.addEventListener("change", () => choose(figure, i)));
    figure.querySelectorAll("[data-export]").forEach((node) =>
      node.addEventListener("click", () => exportFigure(figure, node.dataset.export)));
    figure.querySelector("details.numbers").addEventListener("toggle", () => fillTable(figure));
  });
})();
