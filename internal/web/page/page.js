// Keeps the page as it is now. All that comes from containers is put in as text.
"use strict";

const refreshEvery = 5000, keep = 50;
const at = id => document.getElementById(id);

// element makes an element with a class and children, which are elements or text.
function element(name, kind, ...children) {
	const e = document.createElement(name);
	if (kind) e.className = kind;
	e.append(...children.filter(child => child !== null));
	return e;
}

// foreign is a text that somebody else has written.
function foreign(text) {
	const e = document.createElement("bdi");
	e.textContent = text;
	return e;
}

function clock(time) {
	const e = document.createElement("time");
	const date = new Date(time);
	e.textContent = date.toLocaleTimeString([], {hour12: false});
	e.title = date.toLocaleString();
	return e;
}

function verdict(page) {
	if (page.error) return "Not known";
	if (page.in_force) return "In force";
	if (page.mode === "audit") return "Audit: nothing is dropped";
	return page.enforcing ? "In force, but not complete" : "Not in force";
}

function cell(is, text) {
	const e = element("td", "", String(text));
	e.dataset.is = is;
	return e;
}

function row(c) {
	const head = element("th", "", foreign(c.name || c.id), element("small", "", foreign(c.image)));
	head.scope = "row";
	head.title = c.id;
	const tokens = cell("tokens", c.tokens === null ? "–" : c.tokens.toFixed(1));
	tokens.title = c.limit;
	return element("tr", "", head, cell("blocked", c.blocked), cell("mail over", c.mail_refused), cell("mail let through", c.mail_allowed),
		tokens, cell("other", c.malformed + c.sockets + c.host));
}

function show(page) {
	at("node").textContent = page.node;
	at("time").replaceChildren(clock(page.time).textContent);
	at("verdict").textContent = verdict(page);
	at("state").className = page.in_force && !page.error ? "good" : "bad";
	at("why").replaceChildren(...[page.error, ...page.why].filter(Boolean).map(why => element("li", "", foreign(why))));
	at("defences").replaceChildren(...page.defences.map(d =>
		element("li", d.active ? "on" : "off", foreign(d.name), d.reason ? element("small", "", foreign(d.reason)) : null)));
	for (const id of ["blocked", "mail_refused", "mail_allowed", "malformed", "sockets", "host"]) at(id).textContent = page.total[id];
	at("containers").textContent = page.containers;
	at("rows").replaceChildren(...page.rows.map(row));
	const more = page.containers - page.rows.length;
	at("more").textContent = more > 0 ? more + " more, with fewer refusals" : "";
}

// describe says what describe() in serve.go says.
function describe(r) {
	if (r.type === "suppressed") return r.count + " more refusals, too many to show each";
	if (r.type === "lost") return r.count + " refusals were lost (" + r.stage + ")";
	const words = [];
	if (r.process) words.push(r.process.comm + " (" + r.process.pid + "):");
	words.push(r.hook);
	if (r.protocol) words.push(r.protocol);
	if (r.family) words.push(r.family);
	if (r.destination) {
		const {address, port} = r.destination;
		words.push("to " + (port ? (address.includes(":") ? "[" + address + "]" : address) + ":" + port : address));
	}
	words.push("·", r.reason);
	if (r.rule) words.push("by " + r.rule);
	if (r.blocked === false) words.push("(audit: it passed)");
	return words.join(" ");
}

function add(r) {
	const c = r.container, list = at("records");
	const name = element("b", "", foreign(c ? c.name || c.id : ""));
	if (c) name.title = c.id;
	list.prepend(element("li", r.type, clock(r.time), name, element("span", "", foreign(describe(r)))));
	while (list.children.length > keep) list.lastElementChild.remove();
}

async function refresh() {
	if (document.hidden) return;
	try {
		const answer = await fetch("page.json");
		if (!answer.ok) throw new Error(answer.statusText);
		show(await answer.json());
		at("age").className = "";
	} catch {
		at("age").className = "old"; // what is shown is not what is
	}
}

function follow() {
	const source = new EventSource("events");
	source.onopen = () => {
		at("records").replaceChildren(); // the last ones are sent again
		at("live").textContent = "live";
	};
	source.onmessage = message => add(JSON.parse(message.data));
	source.onerror = () => {
		at("live").textContent = "";
		if (source.readyState === EventSource.CLOSED) setTimeout(follow, refreshEvery);
	};
	addEventListener("pagehide", () => source.close());
}

refresh();
setInterval(refresh, refreshEvery);
document.addEventListener("visibilitychange", refresh);
follow();
