// Fetches the page anew when the daemon says that something happened. Without this script it is a page
// like any other.
(() => {
  const told = document.getElementById("live");
  let due = null;
  const renew = async () => {
    due = null;
    const busy = document.activeElement && document.activeElement.matches("main input");
    if (busy) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const focus = document.activeElement && document.activeElement.id;
      document.getElementById("main").replaceWith(page.getElementById("main"));
      if (focus && document.getElementById(focus)) document.getElementById(focus).focus();
      told.textContent = "as of " + new Date().toLocaleTimeString();
    } catch (_) {}
  };
  const events = new EventSource("/live");
  events.onmessage = () => { if (!due) due = setTimeout(renew, 250); };
  events.onopen = () => { told.textContent = "live"; };
  events.onerror = () => { told.textContent = "the daemon is away"; };
})();
