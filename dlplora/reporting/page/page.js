"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, cls) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const options = (select, values, all) => {
    select.replaceChildren(...(all ? [new Option(all, "")] : []), ...values.map((value) => new Option(value, value)));
  };
  const state = { key: null, descending: true };
  const suite = () => data.suites.find((one) => one.name === $("suite").value) || data.suites[0];

  const columns = () => {
    const task = $("task").value;
    if (!task) return data.columns;
    return [{ key: "task", title: task.replaceAll("_", " ") + " %", scale: 100, digits: 1, better: true }];
  };
  const cell = (row, column) => (column.key === "task" ? [row.tasks[$("task").value] ?? null, null, false] : row.cells[column.key] || [null, null, false]);
  const shown = () => {
    const part = $("method").value.trim().toLowerCase();
    const backbone = $("backbone").value;
    const rows = suite().rows.filter((row) => row.method.toLowerCase().includes(part) && (!backbone || row.backbone === backbone));
    if (state.key === null) return rows;
    const value = (row) => (state.key === "method" ? row.method : cell(row, { key: state.key })[0]);
    return rows.slice().sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return state.descending ? -order : order;
    });
  };
  const heading = (key, title) => {
    const th = make("th");
    th.scope = "col";
    const button = make("button", title);
    button.type = "button";
    button.dataset.key = key;
    th.append(button);
    if (state.key === key) th.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    return th;
  };
  const table = () => {
    const list = columns();
    if (state.key !== null && state.key !== "method" && !list.some((one) => one.key === state.key)) state.key = null;
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
    const head = make("tr");
    head.append(heading("method", "method"), ...list.map((one) => heading(one.key, one.title)));
    $("table").tHead.replaceChildren(head);
    const rows = shown();
    const best = Object.fromEntries(list.filter((one) => one.better).map((one) => [one.key, Math.max(...rows.map((row) => cell(row, one)[0] ?? -Infinity))]));
    $("table").tBodies[0].replaceChildren(...rows.map((row) => {
      const tr = make("tr");
      const name = make("td", row.method + (data.backbones.length > 1 ? " · " + row.backbone : ""));
      tr.append(name, ...list.map((one) => {
        const [value, error, tie] = cell(row, one);
        if (value === null) return make("td", "");
        const text = (value * one.scale).toFixed(one.digits) + (error === null ? "" : " ± " + (error * one.scale).toFixed(one.digits)) + (tie ? " °" : "");
        return make("td", text, one.better && value === best[one.key] ? "best" : "");
      }));
      return tr;
    }));
    $("count").textContent = rows.length + " of " + suite().rows.length + " rows";
    if (focused) { const again = $("table").tHead.querySelector(`[data-key="${focused}"]`); if (again) again.focus(); }
  };
  const hue = (name) => {
    const index = suite().tasks.indexOf(name);
    return `hsl(${((index < 0 ? 0 : index) * 137.5) % 360} 60% 50%)`;
  };
  const trace = (route, answer) => {
    const box = make("div");
    route.forEach(([at, weights], index) => {
      const names = Object.entries(weights).sort((a, b) => b[1] - a[1]);
      const chip = make("span", undefined, "chip");
      chip.style.borderColor = names.length ? hue(names[0][0]) : "transparent";
      const end = index + 1 < route.length ? route[index + 1][0] : undefined;
      const said = answer === null ? "" : answer.slice(at, end).trim();
      chip.textContent = (said ? "“" + said + "” " : "") + (names.slice(0, 4).map(([name, weight]) => name + " " + weight.toFixed(2)).join(", ") || "no expert") + (names.length > 4 ? ", …" : "");
      box.append(chip);
    });
    return box;
  };
  const question = () => {
    const chosen = ((suite().questions || {})[$("q-task").value] || [])[Number($("q-number").value)];
    if (!chosen) return $("question").replaceChildren(make("p", "No outcomes of single questions were kept for this suite.", "hint"));
    const table = make("table");
    const head = make("tr");
    head.append(...["method", "", "answer", "routing"].map((title) => make("th", title)));
    table.append(make("thead"), make("tbody"));
    table.tHead.append(head);
    for (const [method, right, answer, route] of chosen.answers) {
      const tr = make("tr");
      const mark = make("td", right ? "right" : "wrong", right ? "right" : "wrong");
      const said = typeof answer === "number" ? (chosen.choices ? chosen.choices[answer] : "option " + (answer + 1)) : answer;
      const routing = make("td");
      routing.append(route === null ? make("span", "token by token", "hint") : trace(route, typeof answer === "string" ? answer : null));
      tr.append(make("td", method), mark, make("td", said), routing);
      table.tBodies[0].append(tr);
    }
    const scroll = make("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.append(table);
    const parts = chosen.prompt === null ? [] : [make("pre", chosen.prompt + (chosen.choices ? "\n\nOptions: " + chosen.choices.join(" | ") : "")), make("p", "Right: " + chosen.gold, "right")];
    $("question").replaceChildren(...parts, scroll);
  };
  const numbers = () => {
    const list = (suite().questions || {})[$("q-task").value] || [];
    $("q-number").replaceChildren(...list.map((one, index) => new Option(String(one.number), String(index))));
    question();
  };
  const whole = () => {
    const now = suite();
    options($("task"), now.tasks, "all");
    options($("q-task"), Object.keys(now.questions || {}));
    $("caption").textContent = now.caption;
    $("figures").replaceChildren(...Object.entries(now.figures).map(([name, svg]) => {
      const figure = make("figure");
      figure.innerHTML = svg;
      figure.append(make("figcaption", name));
      return figure;
    }));
    table();
    numbers();
  };
  options($("suite"), data.suites.map((one) => one.name));
  options($("backbone"), data.backbones, "all");
  $("table").tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const key = button.dataset.key;
    state.descending = state.key === key ? !state.descending : key !== "method";
    state.key = key;
    table();
    $("table").tHead.querySelector(`[data-key="${key}"]`).focus();
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("suite").addEventListener("change", whole);
  for (const id of ["backbone", "task"]) $(id).addEventListener("change", table);
  $("method").addEventListener("input", table);
  $("q-task").addEventListener("change", numbers);
  $("q-number").addEventListener("change", question);
  if (data.suites.length) whole();
})();
