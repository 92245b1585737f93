//! What views cost, and whether the time of an answer tells what others have.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use cofferdam_castore::{
    B3Digest, Store, Views,
    blobservice::BlobService,
    grpc::{ServeOptions, add_services},
    import::import_path,
    views::Grants,
};
use cofferdam_rpc::{Listener, RoutesBuilder, serve_routes};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpListener, net::UnixListener, runtime::Runtime};
use tokio_util::sync::CancellationToken;

use super::{
    measure::{ROUNDS, Series, report},
    store::local_store,
    tree::make_tree,
};

/// Blobs that the other client has, and as many that nobody has.
const GUESSES: usize = 1_000;

/// How often each is asked for.
const QUESTIONS: usize = 10;

/// A served store with one client over a socket and another over TCP.
struct Served {
    runtime: Runtime,
    clients: [Store; 2],
}

impl Served {
    fn new(dir: &Path, is_divided: bool) -> Result<Self> {
        let store = local_store(dir)?;
        let views = match is_divided {
            true => Views::divided(store, Grants::open(&dir.join("grants.redb"), Some(&dir.join("blobs")))?),
            false => Views::whole(store),
        };
        let (runtime, socket) = (Runtime::new()?, dir.join("socket"));
        let inside = runtime.enter();
        let tcp = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let addrs = [format!("grpc+unix://{}", socket.display()), format!("grpc+http://{}", tcp.local_addr()?)];
        let listeners = vec![Listener::Unix(UnixListener::bind(socket)?), Listener::Tcp(tcp)];
        drop(inside);
        let (mut routes, options) = (RoutesBuilder::default(), ServeOptions::default());
        add_services(&mut routes, &views, &options, CancellationToken::new());
        runtime.spawn(async move {
            let (shutdown, stop) = (CancellationToken::new(), CancellationToken::new());
            serve_routes(routes, &[], &[], listeners, &options.rpc, shutdown, stop).await
        });
        let [one, other] = addrs.map(|addr| Store::from_addrs(&addr, &addr));
        Ok(Self { runtime, clients: [one?, other?] })
    }
}

pub(crate) fn views(dir: &TempDir) -> Result<()> {
    import(dir)?;
    guess(&dir.path().join("guessed"))
}

/// The same import into a store with grants and into one without.
fn import(dir: &TempDir) -> Result<()> {
    let (tree, state) = (dir.path().join("tree"), dir.path().join("state"));
    make_tree(&tree)?;
    let [mut divided, mut whole] = [(); 2].map(|()| Series::default());
    for _ in 0..ROUNDS {
        for (series, is_divided) in [(&mut divided, true), (&mut whole, false)] {
            fs::create_dir(&state)?;
            let served = Served::new(&state, is_divided)?;
            nix::unistd::sync();
            series.work(|| Ok(import_path(&served.clients[0], &tree)?))?;
            drop(served);
            fs::remove_dir_all(&state)?;
        }
    }
    report("put 10,000 files : without grants", &divided, &whole, "≤ 1.1");
    Ok(())
}

/// Times the answers to one client about what another has, and about what nobody has, in turn.
fn guess(dir: &Path) -> Result<()> {
    fs::create_dir(dir)?;
    let served = Served::new(dir, true)?;
    let [owner, guesser] = &served.clients;
    let digests = |word: &str| (0..GUESSES).map(|number| format!("{word} {number}").into_bytes()).collect::<Vec<_>>();
    let (theirs, nobodys) = (digests("theirs"), digests("nobodys"));
    served.runtime.block_on(async {
        for contents in &theirs {
            put(&*owner.blobs, contents).await?;
        }
        // Grants of its own, so that there is something to look through.
        for contents in digests("own") {
            put(&*guesser.blobs, &contents).await?;
        }
        let [mut theirs_took, mut nobodys_took] = [(); 2].map(|()| Vec::new());
        for round in 0..QUESTIONS {
            for (number, pair) in theirs.iter().zip(&nobodys).enumerate() {
                let mut asked = [(&mut theirs_took, pair.0), (&mut nobodys_took, pair.1)];
                if (round + number) % 2 == 0 {
                    asked.reverse();
                }
                for (took, contents) in asked {
                    took.push(ask(&*guesser.blobs, &B3Digest::of(contents)).await?);
                }
            }
        }
        let p = mann_whitney(&theirs_took, &nobodys_took);
        let [theirs, nobodys] = [theirs_took, nobodys_took].map(Series::of);
        report("stat of others' blobs : of nobody's", &theirs, &nobodys, &format!("p = {p:.3}, > 0.05"));
        Ok(())
    })
}

async fn put(blobs: &dyn BlobService, contents: &[u8]) -> io::Result<()> {
    let mut writer = blobs.open_write().await;
    writer.write_all(contents).await?;
    writer.close().await.map(drop)
}

async fn ask(blobs: &dyn BlobService, digest: &B3Digest) -> Result<Duration> {
    let begun = Instant::now();
    let has = blobs.has(digest).await?;
    let took = begun.elapsed();
    ensure!(!has, "the client has what it has not put");
    Ok(took)
}

/// The probability that two series as different as these come from the same distribution: the Mann-Whitney U test, with the
/// normal approximation for many values and the correction for ties.
fn mann_whitney(one: &[Duration], other: &[Duration]) -> f64 {
    let mut all: Vec<_> = one.iter().map(|time| (time, true)).chain(other.iter().map(|time| (time, false))).collect();
    all.sort_unstable();
    let (mut rank_sum, mut ties, mut below) = (0.0, 0.0, 0.0);
    for equal in all.chunk_by(|(time, _), (next, _)| time == next) {
        let count = equal.len() as f64;
        let rank = below + (count + 1.0) / 2.0;
        rank_sum += rank * equal.iter().filter(|(_, is_one)| *is_one).count() as f64;
        ties += count.powi(3) - count;
        below += count;
    }
    let [n, m] = [one, other].map(|series| series.len() as f64);
    let u = rank_sum - n * (n + 1.0) / 2.0;
    let variance = n * m / 12.0 * (n + m + 1.0 - ties / ((n + m) * (n + m - 1.0)));
    let z = (u - n * m / 2.0).abs() / variance.sqrt();
    erfc(z / std::f64::consts::SQRT_2)
}

/// The complementary error function of a number that isn't negative, with an error below 1.5 × 10⁻⁷: Abramowitz and Stegun,
/// 7.1.26.
fn erfc(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let series = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    series.into_iter().fold(0.0, |sum, factor| (sum + factor) * t) * (-x * x).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are those of R's `wilcox.test(exact = FALSE, correct = FALSE)`.
    #[test]
    fn ranks_tell_series_apart() {
        let times = |numbers: &[u64]| numbers.iter().map(|number| Duration::from_nanos(*number)).collect::<Vec<_>>();
        let p = |one: &[u64], other: &[u64]| mann_whitney(&times(one), &times(other));
        assert!((p(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5]) - 1.0).abs() < 1e-6);
        assert!((p(&[1, 2, 3, 4, 5], &[6, 7, 8, 9, 10]) - 0.009_023_44).abs() < 1e-6);
        assert!((p(&[6, 7, 8, 9, 10], &[1, 2, 3, 4, 5]) - 0.009_023_44).abs() < 1e-6);
    }
}
