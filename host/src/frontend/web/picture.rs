//! A build's time as pictures: its phases, and what its command used of processor and memory.

use std::time::Duration;

use crate::{
    build::Phase,
    quantity::{show_duration, show_size},
    records::{Record, Sampled},
};

/// The width of a picture, in its own units.
const WIDTH: f64 = 1000.0;

/// The height of a curve.
const HEIGHT: f64 = 100.0;

/// The narrowest bar.
const LEAST_WIDTH: f64 = 2.0;

/// A phase of a build.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) phase: &'static str,
    pub(super) from: String,
    pub(super) took: String,
    pub(super) x: String,
    pub(super) width: String,
    /// It isn't over.
    pub(super) is_open: bool,
}

/// The phases of a build that has been there for so long.
pub(super) fn bars(record: &Record, age: Duration) -> Vec<Bar> {
    let whole = record.ended.unwrap_or(age).max(Duration::from_millis(1));
    let ends = record.phases.iter().skip(1).map(|(_, begun)| Some(*begun)).chain([record.ended]);
    let scaled = |time: Duration| time.as_secs_f64() / whole.as_secs_f64() * WIDTH;
    let bar = |((phase, begun), end): (&(Phase, Duration), Option<Duration>)| {
        let until = end.unwrap_or(whole).max(*begun);
        Bar {
            phase: phase.word(),
            from: show_duration(*begun),
            took: show_duration(until - *begun),
            x: format!("{:.1}", scaled(*begun).min(WIDTH - LEAST_WIDTH)),
            width: format!("{:.1}", scaled(until - *begun).clamp(LEAST_WIDTH, WIDTH)),
            is_open: end.is_none(),
        }
    };
    record.phases.iter().zip(ends).map(bar).collect()
}

/// What a command used, over its time.
#[derive(Debug)]
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) class: &'static str,
    /// The points of an SVG polyline.
    pub(super) points: String,
    /// The top of the picture.
    pub(super) most: String,
    pub(super) until: String,
}

/// The curves of samples, which a guest made: they say anything. None for fewer than two.
pub(super) fn curves(samples: &[Sampled]) -> Vec<Curve> {
    let end = samples.last().map_or(0, |last| last.wall_ms);
    if samples.len() < 2 || end == 0 {
        return Vec::new();
    }
    let memory = samples.iter().map(|sample| (sample.wall_ms, sample.memory_bytes as f64)).collect::<Vec<_>>();
    let begin = [Sampled { wall_ms: 0, cpu_ms: 0, memory_bytes: 0 }];
    let before = begin.iter().chain(samples);
    let cpus = before.zip(samples).map(|(before, sample)| {
        let wall_ms = sample.wall_ms.saturating_sub(before.wall_ms).max(1);
        (sample.wall_ms, sample.cpu_ms.saturating_sub(before.cpu_ms) as f64 / wall_ms as f64)
    });
    let cpus: Vec<_> = cpus.collect();
    let until = show_duration(Duration::from_millis(end));
    let curve = |name, class, values: &[(u64, f64)], least: f64, show: &dyn Fn(f64) -> String| {
        let most = values.iter().map(|(_, value)| *value).fold(least, f64::max);
        let point = |(at, value): &(u64, f64)| {
            let (x, y) = (*at as f64 / end as f64 * WIDTH, HEIGHT - value / most * HEIGHT);
            format!("{:.1},{y:.1}", x.min(WIDTH))
        };
        let points = values.iter().map(point).collect::<Vec<_>>().join(" ");
        Curve { name, class, points, most: show(most), until: until.clone() }
    };
    vec![
        curve("Processors in use", "cpu", &cpus, 1.0, &|most| format!("{most:.1}")),
        curve("Memory", "memory", &memory, 1.0, &|most| show_size(most as u64)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_stay_within_their_picture_whatever_a_guest_says() {
        let sample = |[wall_ms, cpu_ms, memory_bytes]: [u64; 3]| Sampled { wall_ms, cpu_ms, memory_bytes };
        let honest = [[1000, 500, 1 << 20], [2000, 2500, 2 << 20]].map(sample);
        let [cpu, memory] = &curves(&honest)[..] else { panic!() };
        assert_eq!((cpu.points.as_str(), cpu.most.as_str()), ("500.0,75.0 1000.0,0.0", "2.0"));
        assert_eq!((memory.points.as_str(), memory.most.as_str()), ("500.0,50.0 1000.0,0.0", "2.00 MiB"));
        let hostile = [[u64::MAX, u64::MAX, u64::MAX], [0, 0, 0], [5, u64::MAX, 7]].map(sample);
        for curve in curves(&hostile) {
            for point in curve.points.split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let within = |text: &str, most| (0.0..=most).contains(&text.parse::<f64>().unwrap());
                assert!(within(x, WIDTH) && within(y, HEIGHT), "{point}");
            }
        }
        assert!(curves(&[]).is_empty() && curves(&hostile[..2]).is_empty());
    }
}
