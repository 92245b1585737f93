//! Looks at the daemon's page with Chromium: by keyboard alone, in a narrow and in a wide window, in light and dark colours, with
//! 10,000 builds and a log of 100 MB. The pictures are for people to look at.

mod chromium;

use std::{env, fs, path::Path};

use anyhow::{Result, ensure};
use chromium::Chromium;
use cofferdam_castore::{Node, proto::Entry, proto::EntryExt as _};
use cofferdam_proto::cofferdam::v1::{self as ours, build_service_client::BuildServiceClient};
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};

/// Builds that fail for want of an input.
const BUILDS: usize = 10_000;

const HOSTILE: &str = "<script>alert('x')</script><img src=//example.invalid/x onerror=alert(1)>";

/// 100 MB of log, in colours, and outputs.
const LARGE: &str = "printf '\\033[1;32mok\\033[0m \\033[38;5;208morange\\033[0m %s\\n' \"$HOSTILE\"; \
    x=$(printf '%099d' 7); y=$(for i in 1 2 3 4 5 6 7 8 9 10; do echo $x; done); \
    i=0; while [ $i -lt 100000 ]; do echo \"$y\"; i=$((i+1)); done; printf '\\033[31mneedle\\033[0m at the end\\n'; \
    mkdir -p out/sub; echo '<b>' > 'out/<b>.html'; cp /bin/sh out/sub/tool";

fn main() -> Result<()> {
    let pictures = env::args_os().nth(1).unwrap_or_else(|| "target/page".into());
    let pictures = Path::new(&pictures);
    fs::create_dir_all(pictures)?;
    let cofferdam = Cofferdam::new();
    let daemon =
        Daemon::start(&cofferdam, "[web]\nlisten = '127.0.0.1:0'\n[queue]\nmax = 20000\nmax_per_client = 20000");
    let address = daemon.addrs(2).remove(1);
    tokio::runtime::Runtime::new()?.block_on(many_builds(&daemon))?;
    println!("{BUILDS} builds are on record");
    let large = format!("HOSTILE=\"{HOSTILE}\"; {LARGE}");
    cofferdam.build().on(&daemon).output("build/out").shell(&large).succeeds();
    cofferdam.build().on(&daemon).shell("echo about to fail >&2; exit 3").build_fails("exit_code");
    let token = cofferdam.command(["web-token", "--daemon", &daemon.addr()]).succeeds().stdout;
    let dir = tempfile::tempdir()?;
    let mut browser = Chromium::start(dir.path())?;
    look(&mut browser, &address, token.trim(), pictures)?;
    drop(browser);
    daemon.end().succeeds();
    println!("the page does what it should; see the pictures in {}", pictures.display());
    Ok(())
}

async fn many_builds(daemon: &Daemon) -> Result<()> {
    let channel = daemon.peer().raw_channel();
    let missing = Node::File { digest: cofferdam_castore::B3Digest::of(b"missing"), size: 7, executable: false };
    let build = |number: usize| {
        let mut client = BuildServiceClient::new(channel.clone());
        let mut request = shell(&format!("{HOSTILE} {number}"), &[]);
        request.inputs = vec![Entry::named("x".try_into().expect("it is a name"), missing.clone())];
        let request = ours::BuildRequest { request: Some(encoded(request)), ..Default::default() };
        async move {
            let mut events = client.build(request).await?.into_inner();
            while events.message().await?.is_some() {}
            anyhow::Ok(())
        }
    };
    stream::iter((0..BUILDS).map(build)).buffer_unordered(32).try_collect::<Vec<()>>().await.map(drop)
}

/// Goes through the page without a mouse.
fn look(browser: &mut Chromium, address: &str, token: &str, pictures: &Path) -> Result<()> {
    browser.open(address)?;
    browser.call("Input.insertText", &serde_json::json!({ "text": token }))?;
    browser.enter()?;
    shows(browser, "Builds", pictures, "builds")?;
    browser.tab_to("e.id == 'q'")?;
    browser.call("Input.insertText", &serde_json::json!({ "text": "exit 3" }))?;
    browser.enter()?;
    ensure!(browser.value("document.querySelectorAll('tbody tr').length")? == 1, "the search finds one build");
    browser.tab_to("e.closest('td.command') != null")?;
    browser.enter()?;
    shows(browser, "Failure of the build", pictures, "failure")?;
    browser.open(&format!("{address}/?state=succeeded"))?;
    browser.tab_to("e.closest('td.command') != null")?;
    browser.enter()?;
    shows(browser, "Signed provenance", pictures, "build")?;
    browser.tab_to("e.textContent == 'Show'")?;
    browser.enter()?;
    shows(browser, "needle", pictures, "log")?;
    browser.tab_to("e.id == 'find'")?;
    browser.call("Input.insertText", &serde_json::json!({ "text": "ORANGE" }))?;
    browser.enter()?;
    shows(browser, "1 line found", pictures, "found")?;
    let build = browser.value("document.querySelector('h1 a').href")?;
    let build = build.as_str().unwrap_or_default().to_owned();
    browser.open(&format!("{build}/outputs/0"))?;
    shows(browser, "Download as tar", pictures, "output")?;
    browser.open(&format!("{address}/daemon"))?;
    shows(browser, "On record", pictures, "daemon")?;
    let others: Vec<_> = browser.asked.iter().filter(|asked| !asked.starts_with(address)).cloned().collect();
    ensure!(others.iter().all(|asked| asked == "about:blank"), "nothing else is asked: {others:?}");
    ensure!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    Ok(())
}

/// The page has these words, and fits into narrow and wide windows in light and dark colours.
fn shows(browser: &mut Chromium, words: &str, pictures: &Path, name: &str) -> Result<()> {
    let text = browser.value("document.body.innerText")?;
    ensure!(text.as_str().is_some_and(|text| text.contains(words)), "no {words:?} in {text}");
    for (width, scheme) in [(320, "light"), (320, "dark"), (1100, "dark"), (1100, "light")] {
        browser.look(width, scheme)?;
        let needs = browser.value("document.documentElement.scrollWidth")?;
        ensure!(needs.as_u64().is_some_and(|needs| needs <= width.into()), "{name} is {needs} wide, not {width}");
        browser.picture(&pictures.join(format!("{name}-{width}-{scheme}.png")))?;
    }
    println!("{name} is as it should be");
    Ok(())
}
