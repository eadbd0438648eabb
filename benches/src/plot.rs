//! A report as a picture: one bar a row, its length the ratio to the floor.

use crate::report::Row;

const LINE: f64 = 18.0;
const LEFT: f64 = 330.0;
const WIDTH: f64 = 420.0;
/// Ratios beyond this are cut off; their number is written beside the bar.
const MOST: f64 = 6.0;

/// The rows as an SVG document. Goals are marked by a stroke across the bar.
pub fn svg(title: &str, rows: &[Row]) -> String {
    let height = LINE * (rows.len() as f64 + 3.0);
    let total = LEFT + WIDTH + 160.0;
    let x = |ratio: f64| LEFT + ratio.clamp(0.0, MOST) / MOST * WIDTH;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{total}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"10\" y=\"{LINE}\" \
         font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    let bottom = height - LINE;
    out += &format!(
        "<line x1=\"{0}\" y1=\"{1}\" x2=\"{0}\" y2=\"{bottom}\" stroke=\"black\" stroke-dasharray=\"3 3\"/>\n",
        x(1.0),
        LINE * 1.5
    );
    for (i, row) in rows.iter().enumerate() {
        let y = LINE * (i as f64 + 2.0);
        let colour = if row.misses_goal() { "#c0392b" } else { "#2e7d5b" };
        let label = format!("{}, {}, {}", row.op, row.transport, row.polling);
        let middle = y + LINE * 0.7;
        out += &format!(
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>\n<rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" \
             height=\"{}\" fill=\"{colour}\"/>\n<text x=\"{:.1}\" y=\"{middle}\">{:.2} ({:.1} / {:.1} us)</text>\n",
            LEFT - 8.0,
            escape(&label),
            y + 2.0,
            x(row.ratio) - LEFT,
            LINE - 4.0,
            x(row.ratio) + 6.0,
            row.ratio,
            row.ours_us,
            row.floor_us
        );
        if let Some(goal) = row.goal {
            out += &format!(
                "<line x1=\"{0:.1}\" y1=\"{1}\" x2=\"{0:.1}\" y2=\"{2}\" stroke=\"black\" stroke-width=\"2\"/>\n",
                x(goal),
                y,
                y + LINE
            );
        }
    }
    out + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_drawn_and_text_is_escaped() {
        let row = |op: &str| Row {
            op: op.into(),
            transport: "tcp".into(),
            polling: "busy".into(),
            ours_us: 2.0,
            floor_us: 1.0,
            ratio: 2.0,
            goal: Some(1.3),
            ours_p99_us: None,
        };
        let picture = svg("a < b", &[row("read"), row("a & b")]);
        assert!(
            picture.contains("a &lt; b") && picture.contains("a &amp; b") && picture.contains("read, tcp")
        );
        assert_eq!(picture.matches("#c0392b").count(), 2);
    }
}
