//! The picture of a training.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Result;
use crate::training::Epoch;

const SIZE: (u32, u32) = (960, 420);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(51, 51, 51);
const TRAINING: RGBColor = RGBColor(31, 119, 180);
const TEST: RGBColor = RGBColor(214, 80, 20);

/// A line of a panel.
type Line = (&'static str, RGBColor, fn(&Epoch) -> f32);

/// Draws loss and accuracy over the epochs as SVG.
pub fn draw(history: &[Epoch]) -> Result<String> {
    let mut picture = String::new();
    let area = SVGBackend::with_string(&mut picture, SIZE).into_drawing_area();
    let drawn = area.fill(&WHITE).map_err(Into::into).and_then(|()| {
        let (left, right) = area.split_horizontally(SIZE.0 / 2);
        let loss: Line = ("training", TRAINING, |epoch| epoch.loss);
        panel(&left, "loss", history, &[loss], |range| 0.0..range.end * 1.05)?;
        let training: Line = ("training", TRAINING, |epoch| epoch.training);
        let test: Line = ("held out", TEST, |epoch| epoch.test);
        panel(&right, "accuracy, %", history, &[training, test], |range| {
            range.start.min(90.0) - 1.0..100.0
        })?;
        area.present().map_err(Into::into)
    });
    drop(area);
    drawn.map_err(|error: Box<dyn std::error::Error>| format!("the picture: {error}"))?;
    Ok(picture)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    history: &[Epoch],
    lines: &[Line],
    y: impl Fn(Range<f32>) -> Range<f32>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let values = lines.iter().flat_map(|(_, _, value)| history.iter().map(value));
    let values = values.fold(f32::INFINITY..0.0, |r, v| r.start.min(v)..r.end.max(v));
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(1..history.len().max(2), y(values))?;
    chart
        .configure_mesh()
        .x_desc("epoch")
        .axis_desc_style((FONT, 17).into_font().color(&INK))
        .label_style((FONT, 15).into_font().color(&INK))
        .bold_line_style(INK.mix(0.15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for &(label, colour, value) in lines {
        let points = history.iter().enumerate().map(|(i, epoch)| (i + 1, value(epoch)));
        let line = PathElement::new(points.collect::<Vec<_>>(), colour.stroke_width(2));
        chart
            .draw_series([line])?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .label_font((FONT, 15).into_font().color(&INK))
        .background_style(WHITE.mix(0.85))
        .border_style(INK.mix(0.3))
        .draw()?;
    Ok(())
}
