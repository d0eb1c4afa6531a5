//! What every page has.

use axum::http::header;
use axum::response::IntoResponse;
use maud::{DOCTYPE, Markup, html};

const PAGES: [(&str, &str); 4] = [
    ("/", "Guests"),
    ("/fleet", "Fleet"),
    ("/events", "Events"),
    ("/host", "Host"),
];

/// A page around its main part; `here` is the way to it among [`PAGES`], if it is one of them.
pub(super) fn page(title: &str, here: &str, main: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Stillpoint" }
                link rel="stylesheet" href="/style.css";
                script src="/live.js" defer {}
            }
            body {
                a.skip href="#main" { "To the page" }
                header {
                    span.name { "Stillpoint" }
                    nav aria-label="Pages" {
                        @for (way, name) in PAGES {
                            a href=(way) aria-current=[(way == here).then_some("page")] { (name) }
                        }
                    }
                    output #live aria-live="polite" {}
                }
                main #main { (main) }
            }
        }
    }
}

/// A word with its colour; the word says it all.
pub(super) fn state(word: impl std::fmt::Display, is: Is) -> Markup {
    let class = match is {
        Is::Well => "state well",
        Is::Quiet => "state",
        Is::Busy => "state busy",
        Is::Ill => "state ill",
    };
    html! { span class=(class) { (word) } }
}

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Is {
    /// As it should be.
    Well,
    /// Neither good nor bad.
    Quiet,
    /// Under way.
    Busy,
    /// A person should look.
    Ill,
}

/// The style sheet.
pub(super) async fn style() -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, "text/css; charset=utf-8")];
    (headers, include_str!("style.css"))
}
