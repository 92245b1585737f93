//! Chromium without a window, by its DevTools protocol over two pipes.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use data_encoding::BASE64;
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

/// A browser with one page.
pub(crate) struct Chromium {
    process: Child,
    to: File,
    from: BufReader<File>,
    session: Value,
    next: u64,
    /// What it complained about, and the addresses that it asked.
    pub(crate) complaints: Vec<String>,
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
        for pipe in [&to, &from] {
            mkfifo(pipe, Mode::from_bits_truncate(0o600))?;
        }
        let profile = format!("--user-data-dir={}", dir.join("profile").display());
        let script = "exec chromium --headless --no-sandbox --disable-gpu --remote-debugging-pipe \"$0\" about:blank \
                      3<\"$1\" 4>\"$2\"";
        let process =
            Command::new("sh").args(["-c", script, &profile]).args([&to, &from]).stderr(Stdio::null()).spawn();
        let process = process.context("no sh")?;
        let (to, from) = (File::options().write(true).open(to)?, BufReader::new(File::open(from)?));
        let (complaints, asked) = (Vec::new(), Vec::new());
        let mut this = Self { process, to, from, session: Value::Null, next: 0, complaints, asked };
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
        match message["method"].as_str() {
            Some("Log.entryAdded") => self.complaints.push(message["params"]["entry"]["text"].to_string()),
            Some("Runtime.exceptionThrown" | "Page.javascriptDialogOpening") => {
                self.complaints.push(message.to_string());
            }
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

    /// Waits until the page has loaded.
    fn loaded(&mut self) -> Result<()> {
        while self.read()?["method"] != "Page.loadEventFired" {}
        Ok(())
    }

    pub(crate) fn open(&mut self, address: &str) -> Result<()> {
        self.call("Page.navigate", &json!({ "url": address }))?;
        self.loaded()
    }

    /// Presses a key, such as `Tab` or `Enter`.
    pub(crate) fn press(&mut self, key: &str, code: u32) -> Result<()> {
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", &event)?;
        }
        Ok(())
    }

    /// Presses Enter, which leads to another page.
    pub(crate) fn enter(&mut self) -> Result<()> {
        self.press("Enter", 13)?;
        self.loaded()
    }

    /// Presses Tab until the focus is on what this expression, of `e`, tells.
    pub(crate) fn tab_to(&mut self, wanted: &str) -> Result<()> {
        for _ in 0..200 {
            self.press("Tab", 9)?;
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
        let shot = self.call("Page.captureScreenshot", &json!({ "format": "png" }))?;
        let png = BASE64.decode(shot["data"].as_str().unwrap_or_default().as_bytes())?;
        fs::write(path, png).with_context(|| format!("can't write {}", path.display()))
    }
}
