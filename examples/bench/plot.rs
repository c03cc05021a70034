//! Curves: throughput and latency against the number of clients.

use super::rows::Side;
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

/// The size of a picture, in pixels.
const SIZE: (u32, u32) = (860, 420);

/// One side's curve: by the number of clients.
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(usize, Side)>,
}

/// Draws throughput and, beside it, the latency of 50 and 99 of a hundred calls.
///
/// # Errors
/// When the picture can't be written.
pub(crate) fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 18))?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    let of = |get: fn(&Side) -> f64| -> Vec<(String, Vec<(f64, f64)>)> {
        let points = |curve: &Curve| {
            let points = curve.points.iter().map(|(clients, side)| (*clients as f64, get(side)));
            (curve.name.clone(), points.collect())
        };
        curves.iter().map(points).collect()
    };
    panel(&left, "operations/s", &of(|side| side.rate))?;
    let mut latencies = Vec::new();
    for (quantile, lines) in [("p50", of(|side| side.p50)), ("p99", of(|side| side.p99))] {
        let named = |(name, points)| (format!("{name}, {quantile}"), points);
        latencies.extend(lines.into_iter().map(named));
    }
    panel(&right, "ms", &latencies)?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area<'_>,
    unit: &str,
    lines: &[(String, Vec<(f64, f64)>)],
) -> Result<(), Box<dyn Error>> {
    let all = || lines.iter().flat_map(|(_, points)| points);
    let most = all().map(|point| point.0).fold(1.0, f64::max);
    let highest = all().map(|point| point.1).fold(0.0, f64::max);
    let lowest = all().map(|point| point.1).filter(|it| *it > 0.0).fold(highest, f64::min);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(
        (0.9..most * 1.1).log_scale(),
        (lowest / 2.0..highest * 2.0).log_scale(),
    )?;
    chart.configure_mesh().x_desc("clients").y_desc(unit).draw()?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = Palette99::pick(index).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    Ok(())
}
