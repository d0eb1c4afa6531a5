//! A little SVG: shapes by class, and one style sheet for light and dark.

use std::fmt::Write;

/// What does not depend on light or dark.
const SHAPES: &str = "
text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif;
  font-size: 13px; }
.title { font-size: 19px; font-weight: 600; }
.small { font-size: 12px; }
.bold { font-weight: 600; }
text.on, text.ondark, text.onlight { font-size: 12px; font-weight: 600; }
.grid { stroke-width: 1; }
.mark { stroke-width: 2.5; }
.thin { stroke-width: 1.5; }
.box { fill-opacity: .6; stroke-width: 1.5; }
.dot { fill-opacity: .5; }
.guest { fill: none; stroke-width: 1.2; stroke-dasharray: 4 3; }
";

/// Selector, property, colour on a light page, on a dark one. No CSS variables: not every viewer
/// knows them. One that knows no media queries shows the light ones.
const COLOURS: [(&str, &str, &str, &str); 30] = [
    ("text", "fill", "#1f2430", "#e8ebf1"),
    ("text.soft", "fill", "#5b6475", "#a2abba"),
    ("text.on", "fill", "#ffffff", "#ffffff"),
    ("text.ondark", "fill", "#1f2430", "#14171d"),
    (".page, .box", "fill", "#ffffff", "#14171d"),
    (".grid", "stroke", "#e1e5ec", "#2c323d"),
    (".mark, .thin", "stroke", "#1f2430", "#f4f6fa"),
    (".box", "stroke", "#1f2430", "#f4f6fa"),
    (".ours", "fill", "#2563eb", "#6ea8fe"),
    (".whole", "fill", "#7c3aed", "#b794f6"),
    (".qemu", "fill", "#0f9d6b", "#4ad6a3"),
    (".floor", "fill", "#d9730d", "#ffab57"),
    (".none", "fill", "#8a93a3", "#7d8798"),
    (".p0", "fill", "#1e3a8a", "#2f56bd"),
    (".p1", "fill", "#2563eb", "#4d86ee"),
    (".p2", "fill", "#6aa5fb", "#8fbcff"),
    (".p3", "fill", "#b3d2fc", "#c9dfff"),
    (".s0", "fill", "#9a4a06", "#a9570c"),
    (".s1", "fill", "#e07b16", "#f08c2c"),
    (".s2", "fill", "#f7b267", "#ffc78a"),
    (".rest", "fill", "#b6bdc9", "#6a7382"),
    (".guest", "stroke", "#5b6475", "#a2abba"),
    ("text.onlight", "fill", "#1f2430", "#1f2430"),
    (".h0", "fill", "#dbeafe", "#c9dfff"),
    (".h1", "fill", "#b3d2fc", "#a9cbff"),
    (".h2", "fill", "#7fb0fa", "#7fb0fa"),
    (".h3", "fill", "#2f6fe8", "#3f7bee"),
    (".h4", "fill", "#1d4fc0", "#2556c4"),
    (".h5", "fill", "#152f78", "#16306f"),
    (".left", "fill", "#eceff4", "#22272f"),
];

fn style() -> String {
    let rules = |colour: fn(&(&str, &str, &'static str, &'static str)) -> &'static str| {
        let mut rules = String::new();
        for row in &COLOURS {
            // Writing to a string does not fail.
            let _ = writeln!(rules, "{} {{ {}: {}; }}", row.0, row.1, colour(row));
        }
        rules
    };
    let (light, dark) = (rules(|row| row.2), rules(|row| row.3));
    format!("{SHAPES}{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n")
}

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

    /// What the picture is of, and a line about it.
    pub(super) fn heading(&mut self, title: &str, about: &str) {
        self.text(28.0, 38.0, "title", Anchor::Start, title);
        self.text(28.0, 60.0, "soft", Anchor::Start, about);
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
             <style>{}</style>\n\
             <rect class=\"page\" x=\"0\" y=\"0\" width=\"{width}\" height=\"{height}\"/>\n{body}</svg>\n",
            style()
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
