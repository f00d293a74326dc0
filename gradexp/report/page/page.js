"use strict";
// Shows records as text: every string enters the page through textContent or setAttribute, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (tag, attributes, ...children) => {
    const made = tag.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
      : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  };

  // --- words and numbers ---
  const number = (x) =>
    x === null || x === undefined ? "NaN" : typeof x !== "number" ? String(x)
      : Number.isInteger(x) ? x.toLocaleString("en") : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(3)
        : String(Number(x.toPrecision(5)));
  const duration = (s) =>
    s < 90 ? `${s.toFixed(0)} s` : s < 5400 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`;
  const yaml = (value, indent = "") =>
    Object.entries(value).map(([key, item]) =>
      item !== null && typeof item === "object" && !Array.isArray(item)
        ? `${indent}${key}:${Object.keys(item).length ? "\n" + yaml(item, indent + "  ") : " {}"}`
        : `${indent}${key}: ${typeof item === "string" ? item : JSON.stringify(item)}`).join("\n");
  const facts = (pairs) =>
    element("dl", { class: "facts" }, ...pairs.filter(([, text]) => text !== null && text !== undefined && text !== "")
      .map(([label, text]) => element("div", {}, element("dt", {}, label), element("dd", {}, text))));

  // --- parts of a panel ---
  const command = (text) => {
    const code = element("pre", { class: "command", tabindex: "0" }, text);
    const button = element("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
    });
    return element("div", { class: "with-copy" }, code, button);
  };

  const sparkline = (name, { n, y }) => {
    const finite = y.filter((v) => v !== null);
    if (finite.length < 2) return null;
    const [low, high] = [Math.min(...finite), Math.max(...finite)];
    const logarithmic = low > 0 && high / low > 30;
    const scaled = (v) => (logarithmic ? Math.log(v) : v);
    const span = scaled(high) - scaled(low) || 1;
    let pen = "M";
    const path = y.map((v, i) => {
      if (v === null) { pen = "M"; return ""; }
      const place = `${pen}${((240 * i) / (y.length - 1)).toFixed(1)},${(62 - (60 * (scaled(v) - scaled(low))) / span).toFixed(1)}`;
      pen = "L";
      return place;
    }).join("");
    const last = y[y.length - 1];
    const description = `${name}: ${n} values from ${number(y[0])} to ${number(last)}, lowest ${number(low)}, highest ${number(high)}`;
    return element("figure", { class: "curve" },
      element("figcaption", {}, element("span", {}, name), element("b", {}, number(last))),
      element("svg:svg", { viewBox: "0 0 240 64", preserveAspectRatio: "none", role: "img", "aria-label": description },
        element("svg:path", { d: "M0,63.5H240", class: "axis" }), element("svg:path", { d: path, class: "line" })),
      element("p", {}, element("span", {}, `${number(low)} to ${number(high)}${logarithmic ? ", log" : ""}`),
        element("span", {}, `1 … ${n}${y.length < n ? `, drawn as ${y.length} means` : ""}`)));
  };

  const about = (record) => {
    const { git, seconds } = record;
    return facts([
      ["seed", number(record.seed)],
      ["time", `${duration(seconds.wall)} (${duration(seconds.cpu)} of CPU)`],
      ["ended", record.ended.replace("T", " ").slice(0, 16)],
      ["machine", [record.device, record.precision, record.threads ? `${record.threads} thread${record.threads > 1 ? "s" : ""}` : ""].filter(Boolean).join(", ")],
      ["commit", (git.commit || "none").slice(0, 12) + (git.dirty ? " (dirty)" : "")],
      ["parameters", record.parameters === undefined ? "" : number(record.parameters)],
      ["images/s", record.images_per_second === undefined ? "" : number(record.images_per_second)],
      ["peak memory", `${number(record.peak_memory_mib)} MiB`],
      ["data", record.data ? [record.data.name, record.data.train_images ? `${number(record.data.train_images)} images` : "", record.data.subset || record.data.train].filter(Boolean).join(", ") : ""],
    ]);
  };

  const SHOWN = new Set(["id", "experiment", "scale", "seed", "status", "numbers", "curves", "command", "config", "upstream", "seconds", "peak_memory_mib", "git", "started", "ended", "device", "precision", "threads", "parameters", "images_per_second"]);
  const runBlock = (id, open) => {
    const record = data.records[id];
    const numbers = Object.entries(record.numbers).map(([name, value]) => [name, number(value)]);
    const curves = Object.entries(record.curves).map(([name, value]) => sparkline(name, value)).filter(Boolean);
    const upstream = Object.entries(record.upstream).map(([name, run]) =>
      element("p", {}, `${name}: `, run.id in data.records ? element("a", { href: `#run-${run.id}` }, `run ${run.id}`) : `run ${run.id}`));
    const rest = Object.fromEntries(Object.entries(record).filter(([key]) => !SHOWN.has(key)));
    const fold = (title, ...inside) => element("details", {}, element("summary", {}, title), ...inside);
    const block = element("details", { class: "run" },
      element("summary", {}, element("b", {}, `run ${record.id}`), ` ${record.experiment}, scale=${record.scale}, seed ${record.seed}`,
        record.status === "finished" ? "" : element("span", { class: "verdict diverged" }, ` ✕ ${record.status}`)),
      facts(numbers.slice(0, 12)),
      numbers.length > 12 ? fold(`${numbers.length - 12} more numbers`, facts(numbers.slice(12))) : null,
      curves.length ? element("div", { class: "curves" }, ...curves.slice(0, 4)) : null,
      curves.length > 4 ? fold(`${curves.length - 4} more curves`, element("div", { class: "curves" }, ...curves.slice(4))) : null,
      element("h3", {}, "Run it again"), command(record.command),
      element("h3", {}, "Origin"), about(record), ...upstream,
      fold("Config", element("pre", { tabindex: "0" }, yaml(record.config))),
      fold("Versions, data and the rest of the record", element("pre", { tabindex: "0" }, yaml(rest))));
    block.open = open;
    return block;
  };

  // --- the panel ---
  const panel = document.getElementById("panel");
  const part = (name) => document.getElementById(`panel-${name}`);
  const order = Object.keys(data.entries);
  let opener = null;

  const entryOf = (hash) => {
    if (Object.hasOwn(data.entries, hash)) return data.entries[hash];
    const id = hash.startsWith("run-") ? hash.slice(4) : "";
    return id && Object.hasOwn(data.records, id) ? { kind: "Record", title: `run ${id}`, facts: [], runs: [id], todo: [] } : null;
  };
  const anchor = () => decodeURIComponent(location.hash.slice(1));
  const neighbour = (step) => {
    const found = order[order.indexOf(anchor()) + step];
    return found && data.entries[found].kind === part("kind").textContent ? found : null;
  };
  const show = (entry) => {
    part("kind").textContent = entry.kind;
    part("title").textContent = entry.title;
    const standing = entry.facts.length ? facts(entry.facts) : null;
    const todo = entry.todo.length ? [element("h3", {}, entry.runs.length ? "Still missing" : "Not run yet. Run:"), ...entry.todo.map(command)] : [];
    const nothing = !entry.runs.length && !entry.todo.length ? element("p", {}, "Not part of this scale.") : null;
    part("body").replaceChildren(...[standing, nothing, ...entry.runs.map((id, i) => runBlock(id, i === 0)), ...todo].filter(Boolean));
    const known = order.includes(anchor());
    for (const [name, step] of [["previous", -1], ["next", 1]]) {
      document.getElementById(name).hidden = !known;
      document.getElementById(name).disabled = known && !neighbour(step);
    }
    if (!panel.open) panel.showModal();
    panel.scrollTop = 0;
    part("title").focus({ preventScroll: true });
  };
  // Opens the folds that an element is in, itself among them; whether one was closed.
  const unfold = (target) => {
    const closed = [];
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details"))
      if (!fold.open) closed.push(fold);
    for (const fold of closed) fold.open = true;
    return closed.length > 0;
  };
  const route = () => {
    const hash = anchor();
    const entry = entryOf(hash);
    if (!entry) {
      if (panel.open) panel.close();
      const target = hash && document.getElementById(hash);
      if (target && unfold(target)) target.scrollIntoView();
      return;
    }
    const link = document.querySelector(`main a[href="#${CSS.escape(hash)}"]`);
    if (link && hash in data.entries) {
      opener = link;
      unfold(link);
      if (!panel.open) link.scrollIntoView({ block: "center", inline: "nearest", behavior: "instant" });
    } else if (!panel.open) opener = document.activeElement === document.body ? link : document.activeElement;
    show(entry);
  };
  panel.addEventListener("close", () => {
    if (entryOf(anchor())) history.replaceState(null, "", location.href.split("#")[0] + "#");
    if (opener) opener.focus();
  });
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
  panel.addEventListener("keydown", (event) => {
    if (event.target.closest("pre")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const found = step && neighbour(step);
    if (found) location.hash = found;
  });
  document.getElementById("close").addEventListener("click", () => panel.close());
  for (const [name, step] of [["previous", -1], ["next", 1]])
    document.getElementById(name).addEventListener("click", () => { const found = neighbour(step); if (found) location.hash = found; });
  addEventListener("hashchange", route);
  // Following a link whose panel is already in the address opens the panel again.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.hash === location.hash && entryOf(decodeURIComponent(link.hash.slice(1)))) route();
  });

  // Arrow keys walk through a table's cells.
  document.addEventListener("keydown", (event) => {
    const cell = event.target.closest?.(".thesis-table td");
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!cell || !move || panel.open) return;
    const rows = [...cell.closest("tbody").rows];
    const row = rows[rows.indexOf(cell.parentElement) + move[0]];
    const link = row?.cells[cell.cellIndex + move[1]]?.querySelector("a");
    if (link) { link.focus(); event.preventDefault(); }
  });

  // --- pictures, enlarged ---
  const zoom = document.getElementById("zoom");
  for (const button of document.querySelectorAll(".zoom"))
    button.addEventListener("click", () => {
      const picture = button.querySelector("img");
      document.getElementById("zoom-title").textContent = button.parentElement.querySelector("h3 + p").textContent;
      zoom.querySelector(".paper").replaceChildren(element("img", { src: picture.src, alt: picture.alt }));
      zoom.showModal();
    });
  zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
  document.getElementById("zoom-close").addEventListener("click", () => zoom.close());

  // --- theme ---
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const stored = () => { try { return localStorage.getItem("gradexp-theme"); } catch { return null; } };
  const apply = (theme) => {
    button.textContent = `Theme: ${theme}`;
    document.documentElement.dataset.theme = theme;
  };
  apply(themes.includes(stored()) ? stored() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    apply(theme);
    try { localStorage.setItem("gradexp-theme", theme); } catch { /* a page from disk may have no storage */ }
  });

  // --- contents and print ---
  const contents = document.querySelector("nav details");
  const wide = matchMedia("(min-width: 70rem)");
  const fold = () => { contents.open = wide.matches; };
  wide.addEventListener("change", fold);
  fold();
  const nav = document.querySelector("nav.contents");
  const links = [...nav.querySelectorAll("a")];
  const mark = (current) => {
    for (const link of links) {
      if (link === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    for (const item of nav.querySelectorAll("li")) item.classList.toggle("current", item.contains(current));
    if (!wide.matches) return;
    const [inside, outside] = [current.getBoundingClientRect(), nav.getBoundingClientRect()];
    if (inside.top < outside.top || inside.bottom > outside.bottom) nav.scrollTop += inside.top - outside.top - outside.height / 3;
  };
  const seen = new Set(); // what crosses a line near the top of the window
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
    const crossing = links.filter((link) => seen.has(link.hash.slice(1)));
    const target = (link) => document.getElementById(link.hash.slice(1));
    const innermost = crossing.filter((link) => !crossing.some((other) => other !== link && target(link).contains(target(other))));
    // Of two figures side by side, the one that was jumped to, or the left one.
    if (innermost.length) mark(innermost.find((link) => link.hash === location.hash) || innermost[0]);
  }, { rootMargin: "-12% 0px -87% 0px" });
  for (const link of links) watcher.observe(document.getElementById(link.hash.slice(1)));
  nav.classList.add("live");
  mark(links[0]);
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("main details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
  route();
})();
