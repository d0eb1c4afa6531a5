//! Quantiles, and how sure a ratio of two of them is.

use serde::Serialize;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

/// A distribution, ms.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) min: f64,
    pub(crate) p25: f64,
    pub(crate) p50: f64,
    pub(crate) p75: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// Of values in ns; `None` of none.
pub(crate) fn summary(values: &[u64]) -> Option<Summary> {
    let sorted = sorted(values);
    let at = |q| quantile(&sorted, q).map(|ns| ns / 1e6);
    Some(Summary {
        n: sorted.len(),
        min: at(0.0)?,
        p25: at(0.25)?,
        p50: at(0.5)?,
        p75: at(0.75)?,
        p90: at(0.9)?,
        p99: at(0.99)?,
        max: at(1.0)?,
    })
}

fn sorted(values: &[u64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().map(|&value| value as f64).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Between the two nearest values, linearly.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (at.floor(), at.ceil());
    let (a, b) = (sorted.get(low as usize)?, sorted.get(high as usize)?);
    Some(a + (b - a) * (at - low))
}

/// The median of ns values, ms.
pub(crate) fn median(values: &[u64]) -> f64 {
    quantile(&sorted(values), 0.5).unwrap_or(0.0) / 1e6
}

/// A ratio of two quantiles, and the interval that holds it with 95 %, by bootstrap.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// p99 over the median of one sample.
pub(crate) fn tail(values: &[u64]) -> Option<Ratio> {
    let of = |values: &[u64]| {
        let sorted = sorted(values);
        let median = quantile(&sorted, 0.5)?;
        (median > 0.0).then_some(quantile(&sorted, 0.99)? / median)
    };
    bootstrap(of(values)?, |dice| of(&dice.resample(values)))
}

fn bootstrap(value: f64, mut again: impl FnMut(&mut Dice) -> Option<f64>) -> Option<Ratio> {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut seen: Vec<f64> = (0..RESAMPLES).filter_map(|_| again(&mut dice)).collect();
    seen.sort_by(f64::total_cmp);
    Some(Ratio {
        value,
        low: quantile(&seen, 0.025)?,
        high: quantile(&seen, 0.975)?,
    })
}

/// The ratio of the `q` quantiles of two samples.
pub(crate) fn ratio(over: &[u64], under: &[u64], q: f64) -> Option<Ratio> {
    let of = |over: &[u64], under: &[u64]| {
        let under = quantile(&sorted(under), q)?;
        (under > 0.0).then_some(quantile(&sorted(over), q)? / under)
    };
    bootstrap(of(over, under)?, |dice| {
        of(&dice.resample(over), &dice.resample(under))
    })
}

/// The same numbers in every run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn resample(&mut self, values: &[u64]) -> Vec<u64> {
        let n = values.len() as u64;
        (0..n).map(|_| values[(self.roll() % n) as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_values() {
        let of = summary(&[4_000_000, 1_000_000, 3_000_000, 2_000_000]).expect("four values");
        assert_eq!((of.n, of.min, of.p50, of.max), (4, 1.0, 2.5, 4.0));
        assert!(summary(&[]).is_none());
        assert!((median(&[7_000_000]) - 7.0).abs() < 1e-9);
    }

    #[test]
    fn a_ratio_lies_in_its_interval() {
        let under: Vec<u64> = (100..200).collect();
        let over: Vec<u64> = under.iter().map(|v| v * 2).collect();
        let ratio = ratio(&over, &under, 0.5).expect("a ratio");
        assert!((ratio.value - 2.0).abs() < 1e-9);
        assert!(ratio.low < 2.0 && 2.0 < ratio.high && ratio.high < 2.4);
        assert!(super::ratio(&over, &[0, 0], 0.5).is_none());
    }
}
