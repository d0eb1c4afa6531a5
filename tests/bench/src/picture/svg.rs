//! A little SVG: shapes by class, and one style sheet for light and dark.

use std::fmt::Write;

/// Colours and type. A viewer that knows no media queries shows the light ones.
const STYLE: &str = "
svg { --page:#ffffff; --ink:#1f2430; --soft:#5b6475; --line:#dfe3ea; --mark:#1f2430;
  --ours:#2563eb; --floor:#d9730d; --none:#8a93a3;
  --p0:#1e3a8a; --p1:#2563eb; --p2:#60a5fa; --p3:#a9cdfb;
  --s0:#9a4a06; --s1:#e07b16; --s2:#f7b267; --rest:#b6bdc9; }
@media (prefers-color-scheme: dark) {
  svg { --page:#14171d; --ink:#e8ebf1; --soft:#a2abba; --line:#2c323d; --mark:#f4f6fa;
    --ours:#6ea8fe; --floor:#ffab57; --none:#7d8798;
    --p0:#3f6ad8; --p1:#6ea8fe; --p2:#9cc5ff; --p3:#cfe2ff;
    --s0:#c9690f; --s1:#ff9f43; --s2:#ffd09b; --rest:#5a6372; } }
text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif;
  font-size: 13px; fill: var(--ink, #1f2430); }
.title { font-size: 19px; font-weight: 600; }
.soft { fill: var(--soft, #5b6475); }
.small { font-size: 12px; }
.bold { font-weight: 600; }
.on { fill: #ffffff; font-size: 12px; font-weight: 600; }
.onlight { fill: #1f2430; font-size: 12px; font-weight: 600; }
.page { fill: var(--page); }
.grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--mark); stroke-width: 2.5; }
.thin { stroke: var(--mark); stroke-width: 1.5; fill: none; }
.box { fill: var(--page); fill-opacity: .55; stroke: var(--mark); stroke-width: 1.5; }
.dot { fill-opacity: .55; }
.ours { fill: var(--ours); } .floor { fill: var(--floor); } .none { fill: var(--none); }
.p0 { fill: var(--p0); } .p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .rest { fill: var(--rest); }
";

/// A picture being drawn.
pub(super) struct Svg {
    body: String,
    width: f64,
}

/// Where a text is fixed.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    /// An empty one.
    pub(super) fn new(width: f64) -> Self {
        Self {
            body: String::new(),
            width,
        }
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    /// A text, baseline at `y`.
    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.push(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" class="{class}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    /// A straight line.
    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.push(format_args!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    /// A rectangle by corner and size, with a title that shows on hover.
    pub(super) fn rect(&mut self, class: &str, at: (f64, f64), size: (f64, f64), title: &str) {
        let ((x, y), (w, h)) = (at, size);
        let title = escape(title);
        self.push(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{w:.1}" height="{h:.1}" rx="2"><title>{title}</title></rect>"#
        ));
    }

    /// A dot, with a title.
    pub(super) fn dot(&mut self, class: &str, at: (f64, f64), r: f64, title: &str) {
        let (x, y) = at;
        let title = escape(title);
        self.push(format_args!(
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{r}"><title>{title}</title></circle>"#
        ));
    }

    /// Everything of another, over what is here.
    pub(super) fn append(&mut self, other: Self) {
        self.body.push_str(&other.body);
    }

    /// The file.
    pub(super) fn finish(self, height: f64, description: &str) -> String {
        let (width, body) = (self.width, self.body);
        let description = escape(description);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\">\n<title>{description}</title>\n\
             <style>{STYLE}</style>\n\
             <rect class=\"page\" x=\"0\" y=\"0\" width=\"{width}\" height=\"{height}\"/>\n{body}</svg>\n"
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
