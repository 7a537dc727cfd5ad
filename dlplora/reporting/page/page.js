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
  const options = (select, values) => select.replaceChildren(...values.map(([text, value]) => new Option(text, value)));
  const same = (values) => values.map((value) => [value, value]);
  const groups = () => data.groups.filter((one) => one.suite === $("suite").value);
  const settings = (one) => one.backbone + (one.protocol === one.suite ? "" : " · " + one.protocol);
  // All backbones together are shown in the table only; figures and questions are then those of the first one.
  const chosen = () => groups().filter((one) => $("backbone").value === "" || settings(one) === $("backbone").value);
  const group = () => chosen()[0];

  // Missing numbers stay last whichever way a column is sorted.
  const order = (sign) => (a, b) => (a === null || b === null ? (a === null) - (b === null) : sign * (a - b));
  DataTable.type("measured", { detect: () => false, order: { asc: order(1), desc: order(-1) } });

  // Columns with marks (° and †) keep a place for them, so that the numbers stay in line.
  const column = (title, key, get, scale, digits, marked) => ({
    title, key, type: "measured", orderSequence: ["desc", "asc", ""], className: "number", data: null,
    render: (row, kind) => {
      const [value, error, mark] = get(row) || [null, null, ""];
      if (kind === "sort" || kind === "type") return value;
      if (value === null) return "";
      const number = digits ? (value * scale).toFixed(digits) : Math.round(value * scale).toLocaleString("en-US");
      const spread = error === null ? "" : " <small>± " + (error * scale).toFixed(digits) + "</small>";
      const sign = marked ? '<span class="mark">' + (mark === "best" ? "" : mark) + "</span>" : "";
      return (mark === "best" ? "<b>" + number + "</b>" : number) + spread + sign;
    },
  });
  const visible = new Set(data.columns.filter((one) => !one.hidden).map((one) => one.key));
  const hasMark = (cell) => cell && cell[2] && cell[2] !== "best";
  const measured = (rows, key) => rows.some((row) => key in row.cells);
  const columns = (rows) => {
    const task = $("task").value;
    if (!task) return data.columns.filter((one) => visible.has(one.key) && measured(rows, one.key)).map((one) => column(one.title, one.key, (row) => row.cells[one.key], one.scale, one.digits, rows.some((row) => hasMark(row.cells[one.key]))));
    const best = Math.max(...rows.map((row) => row.tasks[task] ?? -1));
    return [column(task.replaceAll("_", " ") + " %", task, (row) => (task in row.tasks ? [row.tasks[task], null, row.tasks[task] === best ? "best" : ""] : null), 100, 1)];
  };
  let table = null;
  let keys = [];
  // Headings of the groups stand between the rows as long as nothing is sorted.
  const headings = () => {
    if (table.order().some(([, direction]) => direction)) return;
    let last = null;
    for (const node of table.rows({ search: "applied", order: "applied" }).nodes().toArray()) {
      const kind = table.row(node).data().kind;
      if (kind !== last) {
        const head = make("tr", undefined, "group");
        const cell = make("th", kinds.get(kind));
        cell.scope = "rowgroup";
        cell.colSpan = keys.length + 1;
        head.append(cell);
        node.before(head);
      }
      last = kind;
    }
  };
  const kinds = new Map(data.kinds);
  const places = data.kinds.map(([key]) => key);
  const draw = () => {
    const [sorted] = table ? table.order().filter(([, direction]) => direction) : [];
    const before = sorted ? [["method", ...keys][sorted[0]], sorted[1]] : null;
    if (table) table.destroy();
    const several = groups().length > 1;
    const all = chosen().flatMap((one) => one.rows.map((row) => ({ ...row, name: row.method + (several ? " · " + settings(one) : "") })));
    const rows = all.filter((row) => $("kind").value === "" || row.kind === $("kind").value);
    rows.sort((a, b) => places.indexOf(a.kind) - places.indexOf(b.kind));
    const shown = columns(rows);
    keys = shown.map((one) => one.key);
    const node = make("table");
    node.id = "table";
    node.createTHead().insertRow().append(...["method", ...shown.map((one) => one.title)].map((title) => { const th = make("th", title); th.scope = "col"; return th; }));
    $("holder").replaceChildren(node);
    const place = before ? ["method", ...keys].indexOf(before[0]) : -1;
    const method = { data: "name", type: "string", orderSequence: ["asc", "desc", ""], render: DataTable.render.text() };
    table = new DataTable(node, {
      data: rows, columns: [method, ...shown.map(({ title, key, ...rest }) => rest)],
      paging: false, searching: true, order: place < 0 ? [] : [[place, before[1]]], autoWidth: false, info: false,
      layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
      language: { emptyTable: "No results.", zeroRecords: "No method matches." },
    });
    table.on("draw", headings);
    filter();
  };
  const filter = () => {
    table.column(0).search($("method").value.trim(), { smart: false }).draw();
    $("count").textContent = table.rows({ search: "applied" }).count() + " of " + chosen().reduce((sum, one) => sum + one.rows.length, 0) + " rows";
  };
  const chooser = () => {
    const rows = chosen().flatMap((one) => one.rows);
    $("columns").replaceChildren($("columns").firstElementChild, ...data.columns.map((one) => {
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.checked = visible.has(one.key);
      box.disabled = !measured(rows, one.key);
      box.addEventListener("change", () => { visible[box.checked ? "add" : "delete"](one.key); draw(); });
      label.append(box, " " + one.title);
      return label;
    }));
  };

  const hue = (name) => {
    const index = group().tasks.indexOf(name); // experts have the names of their tasks; a merged one has no colour
    return index < 0 ? "hsl(0 0% 55%)" : `hsl(${(index * 137.5) % 360} 60% 50%)`;
  };
  const strongest = (weights) => Object.entries(weights).sort((a, b) => b[1] - a[1])[0];
  const pieces = (route, answer) => route.map(([at, weights], index) => [answer.slice(at, index + 1 < route.length ? route[index + 1][0] : undefined), weights]);
  const spoken = (route, answer) => {
    // The generated text, each part underlined in the colour of the expert with the largest weight at that time.
    const box = make("span");
    for (const [text, weights] of pieces(route, answer)) {
      const top = strongest(weights);
      const part = make("span", text, "said");
      part.style.borderColor = top ? hue(top[0]) : "transparent";
      part.title = top ? top[0] : "no expert";
      box.append(part);
    }
    return box;
  };
  const trace = (route, answer) => {
    const box = make("div");
    route.forEach(([at, weights, count], index) => {
      const names = Object.entries(weights).sort((a, b) => b[1] - a[1]);
      const chip = make("span", undefined, "chip");
      chip.style.borderColor = names.length ? hue(names[0][0]) : "transparent";
      const said = typeof answer === "string" && route.length > 1 ? pieces(route, answer)[index][0].trim() : "";
      const more = count > names.length ? ", and " + (count - names.length) + " more" : "";
      chip.textContent = (said ? "“" + said + "” " : "") + (names.map(([name, weight]) => name + " " + weight.toFixed(2)).join(", ") || "no expert") + more;
      box.append(chip);
    });
    return box;
  };

  const unpacked = new Map();
  const unpack = (text) => {
    if (!unpacked.has(text)) {
      const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
      unpacked.set(text, new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json());
    }
    return unpacked.get(text);
  };
  let asked = 0;
  const load = async () => {
    const packed = group().questions[$("q-task").value];
    const ticket = ++asked;
    if (!packed) {
      options($("q-number"), []);
      $("q-note").textContent = "";
      return $("question").replaceChildren(make("p", "No outcomes of single questions were kept.", "hint"));
    }
    const task = await unpack(packed);
    if (ticket !== asked) return undefined; // another task was chosen meanwhile
    options($("q-number"), task.items.map((_, index) => [String(index), String(index)]));
    $("q-note").textContent = "Answers of each method's first seed." + (task.num < task.total ? " " + task.num + " of " + task.total + " questions are in this page." : "");
    return question();
  };
  const question = async () => {
    const packed = group().questions[$("q-task").value];
    if (!packed) return;
    const ticket = asked;
    const task = await unpack(packed);
    if (ticket !== asked) return;
    const number = Number($("q-number").value);
    const [prompt, choices, gold] = task.items[number] || [null, null, null];
    const node = make("table");
    node.append(make("thead"), make("tbody"));
    const head = make("tr");
    head.append(...["method", "", "answer", "routing"].map((title) => { const th = make("th", title); th.scope = "col"; return th; }));
    node.tHead.append(head);
    for (const [name, seed, cells] of task.methods) {
      const cell = cells[number];
      if (!cell || ($("q-which").value !== "" && String(cell[0]) !== $("q-which").value)) continue;
      const [right, answer, route] = [cell[0], task.said[cell[1]], task.routes[cell[2]]];
      const tr = make("tr");
      const said = make("td");
      if (typeof answer === "number") said.textContent = choices ? choices[answer] : "option " + (answer + 1);
      else if (route) said.append(spoken(route, answer || ""));
      else said.textContent = answer;
      const routing = make("td");
      routing.append(route === null ? make("span", "token by token", "hint") : trace(route, answer));
      const title = make("td", name);
      title.title = "seed " + seed;
      tr.append(title, make("td", right ? "right" : "wrong", right ? "right" : "wrong"), said, routing);
      node.tBodies[0].append(tr);
    }
    const scroll = make("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Answers");
    scroll.append(node);
    const parts = prompt === null ? [] : [make("pre", prompt + (choices ? "\n\nOptions: " + choices.join(" | ") : "")), make("p", "Right: " + gold, "right")];
    $("question").replaceChildren(...parts, scroll);
  };
  const step = (by) => {
    const select = $("q-number");
    select.selectedIndex = Math.min(select.options.length - 1, Math.max(0, select.selectedIndex + by));
    question();
  };

  const whole = () => {
    const now = group();
    const kept = $("task").value;
    options($("task"), [["all", ""], ...same(now.tasks)]);
    if (now.tasks.includes(kept)) $("task").value = kept;
    options($("q-task"), same(Object.keys(now.questions)));
    $("caption").textContent = now.caption;
    const found = new Set(now.rows.map((row) => row.kind));
    const kind = $("kind").value;
    options($("kind"), [["all", ""], ...data.kinds.filter(([key]) => found.has(key)).map(([key, title]) => [title, key])]);
    if (found.has(kind)) $("kind").value = kind;
    chooser();
    $("figures").replaceChildren(...Object.entries(now.figures).map(([name, svg]) => {
      const figure = make("figure");
      const image = make("img");
      image.alt = name;
      image.src = "data:image/svg+xml," + encodeURIComponent(svg); // an image runs no script
      figure.append(image, make("figcaption", name));
      return figure;
    }));
    draw();
    load();
  };
  const suite = () => {
    const found = same(groups().map(settings));
    options($("backbone"), found.length > 1 ? [["all", ""], ...found] : found);
    whole();
  };

  $("h-reported").textContent = data.reportedTitle;
  $("reported-note").textContent = data.reportedNote;
  const reported = $("reported");
  const head = reported.createTHead().insertRow();
  head.append(...["method", "setting", "metric", "reported", "evidence", "source"].map((title) => { const th = make("th", title); th.scope = "col"; return th; }));
  const body = reported.createTBody();
  for (const [method, setting, metric, value, evidence, source, url] of data.reported) {
    const row = body.insertRow();
    row.append(...[method, setting, metric, value, evidence].map((text) => make("td", text)));
    const link = make("a", source);
    if (/^https?:/.test(url)) link.href = url;
    row.insertCell().append(link);
  }

  $("filters").addEventListener("submit", (event) => event.preventDefault());
  if (!data.groups.length) return;
  options($("suite"), same([...new Set(data.groups.map((one) => one.suite))]));
  $("suite").addEventListener("change", suite);
  $("backbone").addEventListener("change", whole);
  for (const id of ["task", "kind"]) $(id).addEventListener("change", draw);
  $("method").addEventListener("input", filter);
  $("q-task").addEventListener("change", load);
  for (const id of ["q-number", "q-which"]) $(id).addEventListener("change", question);
  $("q-before").addEventListener("click", () => step(-1));
  $("q-next").addEventListener("click", () => step(1));
  suite();
})();
