// Takes the new page's contents when there is something new; without this the page is loaded anew.
"use strict";
const main = document.querySelector("main");
let busy = false;
new EventSource("/live").onmessage = async () => {
  if (busy) return;
  busy = true;
  try {
    const text = await (await fetch(location.href)).text();
    const next = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    if (next && next.innerHTML !== main.innerHTML) main.innerHTML = next.innerHTML;
  } finally {
    busy = false;
  }
};
