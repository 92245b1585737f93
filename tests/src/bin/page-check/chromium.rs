//! Chromium without a window, by its DevTools protocol over two pipes.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use cofferdam_tests::stretched;
use data_encoding::BASE64;
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

/// Most of a page's height that is in its picture.
const MOST_HEIGHT: f64 = 3000.0;

/// How long it is waited for something on a page.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page.
pub(crate) struct Chromium {
    process: Child,
    to: File,
    from: BufReader<File>,
    session: Value,
    next: u64,
    /// Loaded pages.
    loads: u64,
    /// How long the last one took, from the key or the address to its last byte.
    pub(crate) took: Duration,
    downloads: PathBuf,
    /// The name that the server gave to the last download, and the events about downloads that ended.
    suggested: String,
    downloaded: Vec<Value>,
    /// What it complained about, each with the address at which.
    pub(crate) complaints: Vec<String>,
    /// Addresses that it asked.
    pub(crate) asked: Vec<String>,
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Chromium {
    /// Starts it, with its files in this directory.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let [to, from] = ["to", "from"].map(|name| dir.join(name));
        fs::create_dir(dir.join("downloads"))?;
        for pipe in [&to, &from] {
            mkfifo(pipe, Mode::from_bits_truncate(0o600))?;
        }
        let profile = format!("--user-data-dir={}", dir.join("profile").display());
        let script = "exec chromium --headless --no-sandbox --disable-gpu --ignore-certificate-errors \
                      --remote-debugging-pipe \"$0\" about:blank 3<\"$1\" 4>\"$2\"";
        let process =
            Command::new("sh").args(["-c", script, &profile]).args([&to, &from]).stderr(Stdio::null()).spawn();
        let process = process.context("no sh")?;
        let (to, from) = (File::options().write(true).open(to)?, BufReader::new(File::open(from)?));
        let mut this = Self {
            process,
            to,
            from,
            session: Value::Null,
            next: 0,
            loads: 0,
            took: Duration::ZERO,
            downloads: dir.join("downloads"),
            suggested: String::new(),
            downloaded: Vec::new(),
            complaints: Vec::new(),
            asked: Vec::new(),
        };
        // Each is named by its number.
        let downloads = json!({ "behavior": "allowAndName", "downloadPath": this.downloads, "eventsEnabled": true });
        this.call("Browser.setDownloadBehavior", &downloads)?;
        let target = this.call("Target.createTarget", &json!({ "url": "about:blank" }))?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        this.session = this.call("Target.attachToTarget", &attach)?["sessionId"].clone();
        for domain in ["Page", "Runtime", "Network", "Log"] {
            this.call(&format!("{domain}.enable"), &json!({}))?;
        }
        Ok(this)
    }

    fn read(&mut self) -> Result<Value> {
        let mut message = Vec::new();
        self.from.read_until(0, &mut message)?;
        if message.pop() != Some(0) {
            bail!("Chromium has ended; is Debian's package chromium installed?");
        }
        let message: Value = serde_json::from_slice(&message)?;
        let params = &message["params"];
        match message["method"].as_str() {
            Some("Log.entryAdded") => {
                let [text, url] = ["text", "url"].map(|key| params["entry"][key].as_str().unwrap_or_default());
                self.complaints.push(format!("{url}: {text}"));
            }
            Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Page.javascriptDialogOpening") => {
                self.complaints.push(message.to_string());
            }
            Some("Page.loadEventFired") => self.loads += 1,
            Some("Browser.downloadWillBegin") => {
                params["suggestedFilename"].as_str().unwrap_or_default().clone_into(&mut self.suggested);
            }
            Some("Browser.downloadProgress") if params["state"] != "inProgress" => self.downloaded.push(params.clone()),
            Some("Network.requestWillBeSent") => {
                self.asked.extend(message["params"]["request"]["url"].as_str().map(str::to_owned));
            }
            _ => {}
        }
        Ok(message)
    }

    /// Calls a method, and waits for its answer.
    pub(crate) fn call(&mut self, method: &str, params: &Value) -> Result<Value> {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if self.session.is_string() {
            message["sessionId"] = self.session.clone();
        }
        self.to.write_all(format!("{message}\0").as_bytes())?;
        loop {
            let answer = self.read()?;
            if answer["id"] == self.next {
                return match answer.get("error") {
                    Some(error) => bail!("{method}: {error}"),
                    None => Ok(answer["result"].clone()),
                };
            }
        }
    }

    /// Does what loads a page, and waits until it has loaded.
    fn loading(&mut self, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let (before, begun) = (self.loads, Instant::now());
        act(self)?;
        while self.loads == before {
            self.read()?;
        }
        self.took = begun.elapsed();
        Ok(())
    }

    pub(crate) fn open(&mut self, address: &str) -> Result<()> {
        self.loading(|this| this.call("Page.navigate", &json!({ "url": address })).map(drop))
    }

    /// Presses a key, such as `Tab` or `f`.
    pub(crate) fn press(&mut self, key: &str) -> Result<()> {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            _ => (key.to_ascii_uppercase().bytes().next().unwrap_or_default(), key),
        };
        for kind in ["keyDown", "keyUp"] {
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", &event)?;
        }
        Ok(())
    }

    /// Types a text over what a field has.
    pub(crate) fn type_over(&mut self, text: &str) -> Result<()> {
        let all = json!({ "type": "keyDown", "key": "a", "windowsVirtualKeyCode": 65, "commands": ["selectAll"] });
        self.call("Input.dispatchKeyEvent", &all)?;
        self.call("Input.insertText", &json!({ "text": text })).map(drop)
    }

    /// Presses Enter, which leads to another page.
    pub(crate) fn enter(&mut self) -> Result<()> {
        self.loading(|this| this.press("Enter"))
    }

    /// Presses Enter, which downloads something. Returns its file and the name that the server has given to it.
    pub(crate) fn download(&mut self) -> Result<(PathBuf, String)> {
        let begun = Instant::now();
        self.press("Enter")?;
        while self.downloaded.is_empty() {
            self.read()?;
        }
        self.took = begun.elapsed();
        let ended = self.downloaded.remove(0);
        ensure!(ended["state"] == "completed", "the download ended with {ended}");
        Ok((self.downloads.join(ended["guid"].as_str().unwrap_or_default()), self.suggested.clone()))
    }

    /// Waits until this expression is true.
    pub(crate) fn wait_for(&mut self, wanted: &str) -> Result<()> {
        self.wait(wanted, |this| Ok(this.value(wanted)? == true))
    }

    /// Waits for a complaint with these words.
    pub(crate) fn wait_for_complaint(&mut self, words: &str) -> Result<()> {
        self.wait(words, |this| {
            this.value("0")?;
            Ok(this.complaints.iter().any(|complaint| complaint.contains(words)))
        })
    }

    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !is_so(self)? {
            ensure!(begun.elapsed() < stretched(PATIENCE), "waited in vain for {what}");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Presses Tab until the focus is on what this expression, of `e`, tells.
    pub(crate) fn tab_to(&mut self, wanted: &str) -> Result<()> {
        for _ in 0..200 {
            self.press("Tab")?;
            if self.value(&format!("(e => {wanted})(document.activeElement)"))? == true {
                return Ok(());
            }
        }
        bail!("the keyboard doesn't reach {wanted}")
    }

    pub(crate) fn value(&mut self, expression: &str) -> Result<Value> {
        let answer = self.call("Runtime.evaluate", &json!({ "expression": expression, "returnByValue": true }))?;
        Ok(answer["result"]["value"].clone())
    }

    /// Sets the width of the page and its colours.
    pub(crate) fn look(&mut self, width: u32, scheme: &str) -> Result<()> {
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", &size)?;
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", &json!({ "features": features })).map(drop)
    }

    pub(crate) fn picture(&mut self, path: &Path) -> Result<()> {
        let size = self.call("Page.getLayoutMetrics", &json!({}))?["cssContentSize"].clone();
        let height = size["height"].as_f64().unwrap_or_default().min(MOST_HEIGHT);
        let clip = json!({ "x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1 });
        let picture = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let shot = self.call("Page.captureScreenshot", &picture)?;
        let png = BASE64.decode(shot["data"].as_str().unwrap_or_default().as_bytes())?;
        fs::write(path, png).with_context(|| format!("can't write {}", path.display()))
    }
}
