//! The daemon's page, with the requests of a browser and of somebody who is none.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use cofferdam_castore::B3Digest;
use cofferdam_tests::{Authority, Cofferdam, Daemon, Running, stretched};
use reqwest::{
    Client, Method, Response, StatusCode,
    header::{HeaderMap, LOCATION, SET_COOKIE},
    redirect::Policy,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::runtime::Runtime;

/// Words that would be markup if a page didn't escape them.
const HOSTILE: &str = "<script>alert('x')</script><img src=x onerror=alert(1)>";

/// A tenant whose name would be markup.
const TENANT: &str = "uri:\"><img/src=x/onerror=alert(1)>";

/// A browser, as far as it matters here.
struct Browser {
    runtime: Runtime,
    client: Client,
    address: String,
    cookie: Option<String>,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Browser {
    fn new(address: &str) -> Self {
        Self::over(address, None, None)
    }

    fn over(address: &str, authority: Option<&[u8]>, identity: Option<(&[u8], &[u8])>) -> Self {
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let mut roots = RootCertStore::empty();
        if let Some(authority) = authority {
            roots.add(CertificateDer::from_pem_slice(authority).expect("it is PEM")).expect("it is PEM");
        }
        let builder = builder
            .with_safe_default_protocol_versions()
            .expect("the provider has versions")
            .with_root_certificates(roots);
        let tls = match identity {
            Some((certificate, key)) => {
                let certificate = CertificateDer::from_pem_slice(certificate).expect("it is PEM");
                builder
                    .with_client_auth_cert(vec![certificate], PrivateKeyDer::from_pem_slice(key).expect("it is PEM"))
                    .expect("it is PEM")
            }
            None => builder.with_no_client_auth(),
        };
        let client = Client::builder().tls_backend_preconfigured(tls).no_proxy().redirect(Policy::none());
        let runtime = Runtime::new().expect("there are threads");
        Self {
            runtime,
            client: client.build().expect("the settings are right"),
            address: address.to_owned(),
            cookie: None,
        }
    }

    fn open(&self, method: Method, path: &str, body: String) -> Response {
        let mut request = self.client.request(method, format!("{}{path}", self.address)).body(body);
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", cookie);
        }
        self.runtime.block_on(request.send()).expect("the page answers")
    }

    fn send(&self, method: Method, path: &str, body: String) -> Answer {
        let response = self.open(method, path, body);
        let (status, headers) = (response.status(), response.headers().clone());
        let body = self.runtime.block_on(response.bytes()).expect("the answer is whole").to_vec();
        let answer = Answer { status, headers, body };
        answer.check_headers();
        answer
    }

    fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, String::new())
    }

    fn sign_in(&mut self, token: &str) -> Answer {
        let answer = self.send(Method::POST, "/sign-in", format!("token={token}"));
        if let Some(cookie) = answer.headers.get(SET_COOKIE) {
            self.cookie = Some(
                cookie.to_str().expect("headers are ASCII").split(';').next().expect("a cookie has a name").to_owned(),
            );
        }
        answer
    }
}

impl Answer {
    /// No answer may be taken for anything but what it is, run anything, or be framed.
    fn check_headers(&self) {
        let policy = self.headers["content-security-policy"].to_str().expect("headers are ASCII");
        for word in ["default-src 'none'", "frame-ancestors 'none'"] {
            assert!(policy.contains(word), "{policy}");
        }
        assert!(!policy.contains("script-src") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(self.headers["x-content-type-options"], "nosniff");
        assert_eq!(self.headers["referrer-policy"], "no-referrer");
    }

    #[track_caller]
    fn ok(self) -> Self {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        self
    }

    #[track_caller]
    fn refused(self, status: StatusCode, words: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        assert!(self.text().contains(words), "no {words:?} in {}", self.text());
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The page shows these words, and nothing of a build or a client became markup.
    #[track_caller]
    fn shows(self, words: &[&str]) -> Self {
        let text = self.text();
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
        for markup in
            ["<script", "<img", "<b>", "=\"javascript:", "\u{1b}", "\u{202e}", "style=", "http://", "https://"]
        {
            assert!(!text.contains(markup), "{markup:?} in {text}");
        }
        self
    }

    #[track_caller]
    fn downloads_as(self, name: &str) -> Vec<u8> {
        let this = self.ok();
        assert_eq!(this.headers["content-type"], "application/octet-stream");
        let disposition = this.headers["content-disposition"].to_str().expect("headers are ASCII");
        assert!(disposition.starts_with("attachment; ") && disposition.contains(name), "{disposition}");
        assert!(this.headers["content-security-policy"].to_str().expect("headers are ASCII").contains("sandbox"));
        this.body
    }
}

fn token(cofferdam: &Cofferdam, daemon: &Daemon) -> String {
    cofferdam.command(["web-token", "--daemon", &daemon.addr()]).succeeds().stdout.trim().to_owned()
}

/// The only build that a list names.
fn only_id(cofferdam: &Cofferdam, daemon: &Daemon) -> String {
    let list = cofferdam.command(["builds", "--daemon", &daemon.addr(), "list", "--json"]).succeeds().stdout;
    let lines: Vec<serde_json::Value> =
        list.lines().map(|line| serde_json::from_str(line).expect("it is JSON")).collect();
    let [build] = &lines[..] else { panic!("{list}") };
    build["id"].as_str().expect("it is text").to_owned()
}

#[test]
fn each_tenant_signs_in_and_sees_its_own() {
    let cofferdam = Cofferdam::new();
    let authority = Authority::new();
    let ca = authority.pem();
    let file = |name: &str, text: &str| cofferdam.file(name, text);
    let [certificate, key] = authority.sign(None);
    let (certificate, key, ca_file) = (file("host.pem", &certificate), file("host.key", &key), file("ca.pem", &ca));
    let me = nix::unistd::geteuid();
    let config = format!(
        "[tls]\ncertificate = {certificate:?}\nkey = {key:?}\nclient_ca = {ca_file:?}\n[web]\nlisten = '127.0.0.1:0'\n\
         [tenants]\n'user:{me}' = {{ disk = '200G', records = '5M' }}\n'{TENANT}' = {{}}"
    );
    let daemon = Daemon::start(&cofferdam, &config);
    let address = daemon.addrs(2).remove(1);
    assert!(address.starts_with("https://127.0.0.1:"), "{address}");
    // The build fails before a VM starts, which is enough to have one.
    let missing = format!("x=file:{}:7", B3Digest::of(b"missing"));
    let run = ["run", "--daemon", &daemon.addr(), "--json", "--input", &missing, "--", HOSTILE];
    cofferdam.command(run).is_refused("missing");
    let id = only_id(&cofferdam, &daemon);

    let mut mine = Browser::over(&address, Some(ca.as_bytes()), None);
    mine.get("/").refused(StatusCode::UNAUTHORIZED, "cofferdam web-token");
    mine.get(&format!("/builds/{id}")).refused(StatusCode::UNAUTHORIZED, "cofferdam web-token");
    mine.sign_in("1.2.3").refused(StatusCode::UNAUTHORIZED, "this token is not one of this daemon");
    assert_eq!(mine.cookie, None);
    mine.cookie = Some("cofferdam-session=1.2.3".to_owned());
    mine.get("/").refused(StatusCode::UNAUTHORIZED, "this token is not one of this daemon");
    let answer = mine.sign_in(&token(&cofferdam, &daemon));
    assert_eq!((answer.status, &answer.headers[LOCATION]), (StatusCode::SEE_OTHER, &"/".parse().unwrap()));
    let cookie = answer.headers[SET_COOKIE].to_str().unwrap();
    for word in ["HttpOnly", "SameSite=Strict", "Secure", "Max-Age=43"] {
        assert!(cookie.contains(word), "{cookie}");
    }
    let escaped = "&#60;script&#62;";
    mine.get("/").ok().shows(&[&id, escaped, "failed", &format!("user:{me}")]);
    mine.get("/?state=failed&q=SCRIPT").ok().shows(&[&id]);
    for path in ["/?state=succeeded", "/?q=nothing", "/?state=active", &format!("/?before={id}")] {
        assert!(!mine.get(path).ok().text().contains(escaped), "{path}");
    }
    mine.get("/?q=%3Cscript%3E%22%27").ok().shows(&["&#60;script&#62;&#34;&#39;"]);
    mine.get(&format!("/builds/{id}")).ok().shows(&[
        escaped,
        "missing",
        "Failure of the request",
        "cofferdam build --rebuild",
    ]);
    mine.get(&format!("/builds/{id}/log")).ok().shows(&["0 B"]);
    mine.get("/daemon").ok().shows(&[
        &format!("user:{me}"),
        "in use, ",
        "not counted: all see the whole store",
        "0 builds, which may grow to 0 B of 200.00 GiB",
        "1 build, ",
        " of 5.00 MiB",
        "<p>None</p>",
    ]);
    mine.get("/style.css").ok();
    mine.get("/?state=%3Cb%3E").refused(StatusCode::BAD_REQUEST, "state must be");
    mine.get("/nothing").refused(StatusCode::NOT_FOUND, "there is no such page");
    mine.send(Method::DELETE, &format!("/builds/{id}"), String::new())
        .refused(StatusCode::METHOD_NOT_ALLOWED, "only for looking");

    let [theirs_pem, theirs_key] = authority.sign(Some(TENANT));
    let theirs = Browser::over(&address, Some(ca.as_bytes()), Some((theirs_pem.as_bytes(), theirs_key.as_bytes())));
    theirs.get("/").ok().shows(&["uri:&#34;&#62;&#60;img/src=x/onerror=alert(1)&#62;", "There is no such build"]);
    for path in ["", "/log", "/log/follow", "/log/file", "/request", "/provenance", "/outputs/0"] {
        let path = format!("/builds/{id}{path}");
        theirs.get(&path).refused(StatusCode::NOT_FOUND, "you have no build with this id");
    }
    assert!(!theirs.get("/daemon").ok().text().contains(&format!("user:{me}")));
    let [stranger_pem, stranger_key] = authority.sign(Some("dns:stranger.example"));
    let stranger =
        Browser::over(&address, Some(ca.as_bytes()), Some((stranger_pem.as_bytes(), stranger_key.as_bytes())));
    stranger.get("/").refused(StatusCode::FORBIDDEN, "dns:stranger.example is no tenant of this daemon");

    assert_eq!(mine.send(Method::POST, "/sign-out", String::new()).status, StatusCode::SEE_OTHER);
    daemon.end().succeeds();
}

#[test]
fn a_page_beyond_loopback_needs_tls_and_without_a_page_there_are_no_tokens() {
    let cofferdam = Cofferdam::new();
    let check = |listen: &str| {
        let file = cofferdam.file("web.toml", format!("allow_emulation = true\n[web]\nlisten = '{listen}'"));
        cofferdam.command(["daemon", "--check-config", "--config", file.to_str().unwrap()])
    };
    check("0.0.0.0:8443").exits_with(2).says("web.toml:3: web.listen = '0.0.0.0:8443': must be a loopback address");
    check("[::1]:8443").succeeds();
    let daemon = Daemon::start(&cofferdam, "");
    let refused = cofferdam.command(["web-token", "--daemon", &daemon.addr()]);
    refused.exits_with(2).says("this daemon serves no page").says("[web] listen");
    daemon.end().succeeds();
}

/// Sends bytes as they are, and returns the answer's first ones.
fn raw(address: &str, request: &str) -> String {
    let mut stream =
        TcpStream::connect(address.strip_prefix("http://").expect("it is an address")).expect("it is an address");
    stream.set_read_timeout(Some(stretched(Duration::from_secs(60)))).expect("sockets have timeouts");
    stream.write_all(request.as_bytes()).expect("the page reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("headers are ASCII");
    answer
}

/// The file in an output's directory whose name would be markup, and what is in it.
const PAGE_OF_A_BUILD: &str = "<b>.html";

fn a_hostile_build(cofferdam: &Cofferdam, daemon: &Daemon) {
    let script = format!(
        "printf '%s\\n' \"{HOSTILE}\"; printf '\\033[31mred\\033[0m \\033]8;;javascript:alert(1)\\033\\\\link\\n'; \
         mkdir -p out/sub; printf '%s' \"{HOSTILE}\" > 'out/{PAGE_OF_A_BUILD}'; ln -s ../../etc/passwd out/sub/link; \
         i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo needle in it"
    );
    cofferdam.build().on(daemon).output("build/out").shell(&script).succeeds();
}

#[test]
fn what_a_build_wrote_is_text_on_the_page_and_what_it_made_is_a_download() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[web]\nlisten = '127.0.0.1:0'");
    let address = daemon.addrs(2).remove(1);
    a_hostile_build(&cofferdam, &daemon);
    let id = only_id(&cofferdam, &daemon);
    let mut browser = Browser::new(&address);
    assert_eq!(browser.sign_in(&token(&cofferdam, &daemon)).status, StatusCode::SEE_OTHER);
    let get = |path: &str| browser.get(&format!("/builds/{id}{path}"));

    get("").ok().shows(&["succeeded", "build/out", "phase-running", "Signed provenance", "Used"]);
    get("/log?offset=0").ok().shows(&[
        "&lt;script&gt;alert(",
        "<span class=\"f1\">red</span> link",
        "line 0\n",
        "Later",
    ]);
    get("/log").ok().shows(&["needle in it", "Earlier"]);
    get("/log?find=NEEDLE").ok().shows(&["1 line found", "<mark>needle</mark> in it"]);
    get("/log?find=%3Cimg").ok().shows(&["<mark>&lt;img</mark>"]);
    get("/log?offset=100000000").refused(StatusCode::NOT_FOUND, "beyond");
    get("/log?offset=x").refused(StatusCode::BAD_REQUEST, "offset must be a number");
    let log = get("/log/file").downloads_as("log-");
    let direct = cofferdam.command(["builds", "--daemon", &daemon.addr(), "log", &id]).succeeds().stdout;
    assert_eq!(String::from_utf8_lossy(&log), direct);
    get("/log/follow").ok().shows(&["needle in it", "The log ends here"]);

    get("/outputs/0").ok().shows(&["&#60;b&#62;.html", "sub", "Download as tar"]);
    get("/outputs/0/sub").ok().shows(&["link", "to ../../etc/passwd"]);
    let file =
        get("/outputs/0/%3Cb%3E.html?as=file").downloads_as("filename=\"_b_.html\"; filename*=UTF-8''%3Cb%3E.html");
    assert_eq!(String::from_utf8(file).unwrap(), HOSTILE);
    let tar = get("/outputs/0?as=tar").downloads_as("out.tar");
    let mut tar = tar::Archive::new(&tar[..]);
    let names: Vec<_> = tar.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect();
    assert!(names.iter().any(|name| name == Path::new("sub/link")), "{names:?}");
    let nar = cofferdam.file("out.nar", get("/outputs/0?as=nar").downloads_as("out.nar"));
    let imported = cofferdam.command(["import", "--format", "nar", nar.to_str().unwrap()]).succeeds().stdout;
    get("/outputs/0").ok().shows(&[node_in(&imported)]);
    get("/outputs/0/sub?as=file").refused(StatusCode::BAD_REQUEST, "only a file");
    get("/outputs/1").refused(StatusCode::NOT_FOUND, "no such output");
    get("/outputs/0/none").refused(StatusCode::NOT_FOUND, "there is no &#34;none&#34;");
    let cookie = browser.cookie.as_ref().unwrap();
    for path in ["..", "sub/../../..", "%2e%2e", "sub/..%2f..%2f..%2fetc%2fpasswd"] {
        let path = format!("/builds/{id}/outputs/0/{path}?as=file");
        let answer =
            raw(&address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"));
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("names nothing below an output"), "{answer}");
    }

    // The request, as the page says, is the same one.
    let request = cofferdam.file("request.binpb", get("/request").downloads_as("request-"));
    let again = ["build", "--daemon", &daemon.addr(), request.to_str().unwrap()];
    let again = cofferdam.command(again).succeeds().stdout;
    get("/outputs/0").ok().shows(&[node_in(&again)]);
    serde_json::from_slice::<serde_json::Value>(&get("/provenance").downloads_as("provenance-")).unwrap();
    daemon.end().succeeds();
}

/// The directory that a command has printed.
fn node_in(line: &str) -> &str {
    line.split_ascii_whitespace().find(|word| word.starts_with("dir:")).expect("it prints a directory")
}

/// Asks for so many pages at once, on so many connections, and waits for the first answer of each.
fn flood(address: &str, connections: usize, each: usize) -> Vec<String> {
    let request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(each);
    let open = |_| {
        let mut stream =
            TcpStream::connect(address.strip_prefix("http://").expect("it is an address")).expect("it is an address");
        stream.set_read_timeout(Some(stretched(Duration::from_secs(60)))).expect("sockets have timeouts");
        stream.write_all(request.as_bytes()).expect("the page reads");
        stream
    };
    let streams: Vec<_> = (0..connections).map(open).collect();
    let first = |mut stream: TcpStream| {
        let mut line = [0; 12];
        stream.read_exact(&mut line).expect("the page answers");
        String::from_utf8_lossy(&line).into_owned()
    };
    streams.into_iter().map(first).collect()
}

/// Follows a log until it has this text.
fn follows(browser: &Browser, response: &mut Response, text: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        let piece = browser.runtime.block_on(response.chunk()).expect("the answer goes on");
        seen.extend_from_slice(&piece.unwrap_or_else(|| panic!("no {text:?} in {}", String::from_utf8_lossy(&seen))));
    }
}

#[test]
fn a_log_is_followed_and_a_build_goes_on_while_the_page_is_flooded() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[web]\nlisten = '127.0.0.1:0'");
    let address = daemon.addrs(2).remove(1);
    let building: Running =
        cofferdam.build().on(&daemon).start_shell("i=0; while true; do echo step $i; i=$((i+1)); sleep 1; done");
    building.wait_for("step 1");
    let id = only_id(&cofferdam, &daemon);
    let mut browser = Browser::new(&address);
    assert_eq!(browser.sign_in(&token(&cofferdam, &daemon)).status, StatusCode::SEE_OTHER);
    browser.get("/?state=active").ok().shows(&[&id, "running"]);
    browser.get(&format!("/builds/{id}?live=1")).ok().shows(&["http-equiv=\"refresh\"", "Follow"]);
    let mut followed = browser.open(Method::GET, &format!("/builds/{id}/log/follow"), String::new());
    follows(&browser, &mut followed, "step 1");

    let answers = flood(&address, 100, 100);
    assert!(answers.iter().any(|line| line.ends_with("429")), "{answers:?}");
    assert!(answers.iter().all(|line| line.ends_with("401") || line.ends_with("429")), "{answers:?}");
    // Whoever has signed in is somebody else.
    let text = browser.get(&format!("/builds/{id}")).ok().text();
    assert!(text.contains("running"), "{text}");
    let shown = building.stderr_so_far().matches("step ").count();
    building.wait_for(&format!("step {}", shown + 3));
    follows(&browser, &mut followed, &format!("step {}", shown + 3));

    cofferdam.command(["builds", "--daemon", &daemon.addr(), "cancel", &id]).succeeds();
    building.end().executor_fails("interrupted");
    follows(&browser, &mut followed, "The log ends here");
    browser.get(&format!("/builds/{id}")).ok().shows(&["interrupted", "failed"]);
    daemon.end().succeeds();
}
