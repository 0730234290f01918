//! The roofline picture.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::element::{DashedPathElement, DynElement};
use plotters::prelude::*;

use crate::Result;
use crate::layers::Layer;
use crate::measure::Row;
use crate::options::Order;

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(51, 51, 51);
/// Of the lines of memory levels, from the fastest.
const LEVELS: [RGBColor; 4] =
    [RGBColor(90, 90, 90), RGBColor(148, 103, 189), RGBColor(44, 140, 60), RGBColor(190, 130, 30)];
/// How much of the height the legend takes.
const LEGEND: f64 = 0.33;
/// Bandwidths that differ by less are one memory level's.
const SAME_LEVEL: f64 = 0.8;

/// A memory level as the layers met it.
struct Level {
    /// In GB/s, lowest and highest.
    bandwidth: Range<f64>,
    /// In bytes, smallest and largest.
    sizes: Range<usize>,
}

/// Draws arithmetic intensity against GFLOP/s as SVG: the roofs, and a point per result.
pub fn draw(rows: &[(&Layer, Row)], title: &str) -> Result<String> {
    let mut picture = String::new();
    if let Some(plot) = Plot::of(rows) {
        let area = SVGBackend::with_string(&mut picture, SIZE).into_drawing_area();
        plot.draw(rows, title, &area).map_err(|error| format!("the picture: {error}"))?;
        area.present().map_err(|error| format!("the picture: {error}"))?;
    }
    Ok(picture)
}

struct Plot {
    /// In GFLOP/s.
    peak: f64,
    levels: Vec<Level>,
    /// In flops per byte.
    x: Range<f64>,
    /// In GFLOP/s.
    y: Range<f64>,
}

fn gflops(row: &Row) -> f64 {
    row.cost.flops() / row.median / 1e9
}

impl Plot {
    /// `None` without results.
    fn of(rows: &[(&Layer, Row)]) -> Option<Self> {
        let range = |value: fn(&Row) -> f64| {
            let values = rows.iter().map(|(_, row)| value(row));
            values.fold(f64::INFINITY..0.0, |r, x| r.start.min(x)..r.end.max(x))
        };
        let peak = range(|row| row.roof.flops_per_second / 1e9).end;
        let levels = levels(rows);
        let fastest = levels.first()?.bandwidth.end;
        let intensity = range(|row| row.cost.intensity());
        let x = intensity.start.min(peak / fastest) / 2.0..intensity.end.max(peak / fastest) * 2.0;
        let (low, high) = (range(gflops).start.min(peak / 2.0), peak * 1.25);
        // The lowest part is for the legend.
        let y = low / (high / low).powf(LEGEND / (1.0 - LEGEND))..high;
        Some(Plot { peak, levels, x, y })
    }

    fn draw(
        &self,
        rows: &[(&Layer, Row)],
        title: &str,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let Plot { peak, levels, x, y } = self;
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 22).into_font().color(&INK))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(56)
            .y_label_area_size(72)
            .build_cartesian_2d(
                x.clone().log_scale().with_key_points(ticks(x)),
                y.clone().log_scale().with_key_points(ticks(y)),
            )?;
        let number = |x: &f64| format!("{}", (x * 100.0).round() / 100.0);
        chart
            .configure_mesh()
            .x_desc("arithmetic intensity, flop/byte")
            .y_desc("GFLOP/s")
            .axis_desc_style((FONT, 19).into_font().color(&INK))
            .label_style((FONT, 17).into_font().color(&INK))
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .bold_line_style(INK.mix(0.15))
            .light_line_style(TRANSPARENT)
            .draw()?;

        let ridge = peak / levels.first().map_or(1.0, |level| level.bandwidth.end);
        chart
            .draw_series([PathElement::new([(ridge, *peak), (x.end, *peak)], INK.stroke_width(2))])?
            .label(format!("{peak:.0} GFLOP/s, FMA peak"))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], INK.stroke_width(2)));
        for (level, &colour) in levels.iter().zip(LEVELS.iter().cycle()) {
            let bandwidth = level.bandwidth.end;
            let start = x.start.max(y.start / bandwidth);
            let style = colour.stroke_width(2);
            let line = [(start, start * bandwidth), (peak / bandwidth, *peak)];
            chart
                .draw_series([DashedPathElement::new(line, 7, 4, style)])?
                .label(level.label())
                .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 24, y)], 7, 4, style));
        }
        for (order, colour) in
            [(Order::Nchw, RGBColor(31, 119, 180)), (Order::Nhwc, RGBColor(214, 80, 20))]
        {
            let of_order: Vec<_> = rows.iter().filter(|(_, row)| row.order == order).collect();
            if of_order.is_empty() {
                continue;
            }
            // Marks that stay apart where they overlap, and without colours.
            let mark = move |at: (i32, i32)| -> DynElement<'static, SVGBackend<'_>, (i32, i32)> {
                match order {
                    Order::Nchw => Circle::new(at, 5, colour.mix(0.7).filled()).into_dyn(),
                    Order::Nhwc => TriangleMarker::new(at, 6, colour.mix(0.7).filled()).into_dyn(),
                }
            };
            chart
                .draw_series(of_order.iter().map(|(_, row)| {
                    EmptyElement::at((row.cost.intensity(), gflops(row))) + mark((0, 0))
                }))?
                .label(format!("{}, {} results", order.name().to_uppercase(), of_order.len()))
                .legend(move |(x, y)| mark((x + 12, y)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .margin(16)
            .legend_area_size(36)
            .label_font((FONT, 17).into_font().color(&INK))
            .background_style(WHITE.mix(0.85))
            .border_style(INK.mix(0.3))
            .draw()?;
        Ok(())
    }
}

/// Round numbers, as many as an axis has room for. Decades alone may be one.
fn ticks(range: &Range<f64>) -> Vec<f64> {
    const ROOM: usize = 9;
    let steps: [&[f64]; 3] = [&[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], &[1.0, 2.0, 5.0], &[1.0]];
    let all = steps.map(|steps| {
        let decades = (-9..=15).map(|decade| 10f64.powi(decade));
        let numbers = decades.flat_map(|decade| steps.iter().map(move |step| step * decade));
        numbers.filter(|number| range.contains(number)).collect::<Vec<_>>()
    });
    let [.., coarsest] = &all;
    all.iter().find(|ticks| ticks.len() <= ROOM).unwrap_or(coarsest).clone()
}

/// Memory levels from the fastest.
fn levels(rows: &[(&Layer, Row)]) -> Vec<Level> {
    let mut found: Vec<_> =
        rows.iter().map(|(_, row)| (row.roof.bytes_per_second / 1e9, row.cost.bytes())).collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut levels: Vec<Level> = Vec::new();
    for (bandwidth, bytes) in found {
        match levels.last_mut() {
            Some(level) if bandwidth >= level.bandwidth.end * SAME_LEVEL => {
                level.bandwidth.start = bandwidth;
                level.sizes = level.sizes.start.min(bytes)..level.sizes.end.max(bytes);
            }
            _ => levels.push(Level { bandwidth: bandwidth..bandwidth, sizes: bytes..bytes }),
        }
    }
    levels
}

impl Level {
    /// `95–112 GB/s, 0.3–5 MB`.
    fn label(&self) -> String {
        let span =
            |low: String, high: String| if low == high { low } else { format!("{low}–{high}") };
        let mega = |bytes: usize| match bytes as f64 / 1e6 {
            few if few < 0.01 => format!("{few:.4}"),
            few if few < 1.0 => format!("{few:.2}"),
            many => format!("{many:.0}"),
        };
        let rounded = |bandwidth: f64| format!("{bandwidth:.0}");
        let bandwidth = span(rounded(self.bandwidth.start), rounded(self.bandwidth.end));
        format!("{bandwidth} GB/s, {} MB", span(mega(self.sizes.start), mega(self.sizes.end)))
    }
}
