//! The daemon as a binary cache of Nix, over HTTP.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
};

use cofferdam_tests::{
    Cofferdam, Daemon,
    nix::{Nix, Release},
};
use data_encoding::{BASE64, HEXLOWER};
use sha2::{Digest as _, Sha256};

/// Two derivations of `make`, of which the second needs the first.
const CHAIN: &str = r#"
    let
      first = make "first" "echo told by the first >&2; echo first > $out";
    in make "second" "read word < ${first}; echo told by the second >&2; echo $word ${first} $out > $out"
"#;

const ALICE: &str = "alice's token";
const BOB: &str = "bob's token";

/// A daemon for Alice and Bob, which serves HTTP, and its address there.
fn start(cofferdam: &Cofferdam, cache: &str) -> (Daemon, String) {
    let digest = |token: &str| HEXLOWER.encode(&Sha256::digest(token));
    let config = format!(
        "
        [store]
        isolation = 'tenants'
        [nix]
        speakers = [{}]
        [nix.cache]
        listen = '127.0.0.1:0'
        tokens = {{ 'key:alice' = '{}', 'key:bob' = '{}' }}
        {cache}
        ",
        nix::unistd::getuid(),
        digest(ALICE),
        digest(BOB),
    );
    let daemon = Daemon::start(cofferdam, &config);
    let address = daemon.addrs(2).into_iter().find_map(|addr| addr.strip_prefix("http://").map(str::to_owned));
    (daemon, address.expect("it says so"))
}

/// A file that gives Nix a token.
fn netrc(cofferdam: &Cofferdam, token: &str) -> String {
    let path =
        cofferdam.file(&format!("netrc of {token}"), format!("machine 127.0.0.1 login any password \"{token}\"\n"));
    path.to_str().expect("temporary directories are UTF-8").to_owned()
}

#[test]
fn nix_copies_signed_paths_and_reads_logs() {
    let cofferdam = Cofferdam::new();
    let (daemon, address) = start(&cofferdam, "");
    let [alice, bob] = [ALICE, BOB].map(|token| netrc(&cofferdam, token));
    let own = fs::read_to_string(cofferdam.state_directory().join("nix/signing.pub")).unwrap();
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    let built = nix.build_at(&nix.builder_for("alice"), CHAIN).succeeds();
    let second = built.stdout.trim();
    let copy = |nix: &Nix<'_>, address: &str, netrc: &str, key: &str, to: &str| {
        let to = nix.store(to);
        let store = format!("http://{address}");
        let options = ["--option", "netrc-file", netrc, "--option", "trusted-public-keys", key];
        nix.run("nix", [&["copy", "--from", &store, "--to", to.to_str().unwrap(), second][..], &options].concat())
    };
    let check = |nix: &Nix<'_>, to: &str| {
        let to = nix.store(to);
        let to = to.to_str().unwrap();
        nix.run("nix-store", ["--store", to, "--verify-path", second]).succeeds();
        let references = nix.run("nix-store", ["--store", to, "--query", "--references", second]).succeeds();
        let first = references.stdout.lines().find(|path| path.ends_with("-first")).unwrap();
        assert_eq!(fs::read_to_string(format!("{to}{second}")).unwrap(), format!("first {first} {second}\n"));
    };

    let stranger = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
    let refused = copy(&nix, &address, &alice, stranger, "refused").exits_with(1);
    assert!(refused.stderr.contains("lacks a signature by a trusted key"), "{refused}");
    copy(&nix, &address, &alice, own.trim(), "copied").succeeds();
    check(&nix, "copied");
    for token in [&*bob, "/dev/null"] {
        let refused = copy(&nix, &address, token, own.trim(), "refused").exits_with(1);
        assert!(refused.stderr.contains("is not valid") || refused.stderr.contains("does not exist"), "{refused}");
    }

    let store = format!("http://{address}");
    let log = |netrc: &str| nix.run("nix", ["log", "--store", &store, "--option", "netrc-file", netrc, second]);
    assert_eq!(log(&alice).succeeds().stdout.trim(), "told by the second");
    let refused = log(&bob).exits_with(1);
    assert!(refused.stderr.contains("not available") || refused.stderr.contains("not valid"), "{refused}");

    // For everybody, and compressed.
    daemon.end().succeeds();
    let (daemon, address) = start(&cofferdam, "public = 'key:alice'\ncompression = 'zstd'");
    for release in [Release::Bookworm, Release::Forky] {
        let nix = Nix::new(&cofferdam, &daemon, release);
        for (token, to) in [("/dev/null", "public"), (&*bob, "by-another")] {
            copy(&nix, &address, token, own.trim(), to).succeeds();
            check(&nix, to);
        }
    }
    daemon.end().succeeds();
}

/// A request of HTTP, and what follows until the connection ends: the status, the head and the body.
fn ask(address: &str, method: &str, path: &str, token: Option<&str>) -> (u16, String, Vec<u8>) {
    let mut connection = begin(address, method, path, token, "close");
    let mut answer = Vec::new();
    // A connection is reset that ends before its server has read everything.
    let _ = connection.read_to_end(&mut answer);
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("the head ends");
    let head = String::from_utf8(answer[..end].to_vec()).expect("heads are text");
    let date = head.lines().find(|line| line.starts_with("date: ")).expect("answers have dates").to_owned();
    (head[9..12].parse().expect("a status is a number"), head.replace(&date, ""), answer.split_off(end + 4))
}

fn begin(address: &str, method: &str, path: &str, token: Option<&str>, connection: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("the daemon listens");
    stream.write_all(&request(method, path, token, connection)).expect("the daemon reads");
    stream
}

fn request(method: &str, path: &str, token: Option<&str>, connection: &str) -> Vec<u8> {
    let credentials = token.map(|token| BASE64.encode(format!("any:{token}").as_bytes()));
    let authorization = credentials.map_or_else(String::new, |text| format!("Authorization: Basic {text}\r\n"));
    format!("{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\n{authorization}\r\n").into_bytes()
}

/// Asks for what isn't there, as strangers and clients with bad intent do. `absent` is the answer to an honest question.
fn refuses_what_names_nothing(address: &str, part: &str, nar_path: &str, absent: &(u16, String, Vec<u8>)) {
    let info_path = format!("/{part}.narinfo");
    let other_hash = format!("/nar/{part}-{}.nar", "0".repeat(52));
    for path in [
        "/",
        "/..",
        "/../nix/signing.key",
        "/nar/../../nix/signing.key",
        "//etc/passwd",
        "/log/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        &format!("/%ff{}.narinfo", &part[1..]),
        &format!("/{}.narinfo", "a".repeat(10_000)),
        &format!("/log/{part}-large.drv"),
        &other_hash,
    ] {
        assert_eq!(ask(address, "GET", path, Some(ALICE)), *absent, "{path}");
    }
    for token in [None, Some("another"), Some("")] {
        for path in [&*info_path, nar_path, "/nix-cache-info", "/.."] {
            assert_eq!(ask(address, "GET", path, token).0, 401, "{path}");
        }
    }
    for method in ["PUT", "POST", "DELETE", "OPTIONS"] {
        assert_eq!(ask(address, method, &info_path, Some(ALICE)).0, 405, "{method}");
    }
    assert_eq!(ask(address, "GET", &format!("/{}", "a".repeat(20_000)), Some(ALICE)).0, 431);

    // Bytes that are no text, and no HTTP.
    for bytes in [&b"GET /\xff\xfe HTTP/1.1\r\n\r\n"[..], b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n"] {
        let mut connection = TcpStream::connect(address).expect("the daemon listens");
        connection.write_all(bytes).expect("the daemon reads");
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        assert!(answer.starts_with(b"HTTP/1.1 40"), "{:?}", String::from_utf8_lossy(&answer));
    }
}

/// Asks so many times on each of so many connections at a time. Returns how many requests succeeded.
fn succeeded(address: &str, path: &str, connections: usize, requests: usize) -> usize {
    let ask_often = || {
        let mut connection = TcpStream::connect(address).expect("the daemon listens");
        let one = request("HEAD", path, Some(BOB), "keep-alive");
        let mut answers = Vec::new();
        for _ in 0..requests {
            connection.write_all(&one).expect("the daemon reads");
            let end = answers.len();
            while !answers[end..].ends_with(b"\r\n\r\n") {
                let mut bytes = [0; 4096];
                let count = connection.read(&mut bytes).expect("the daemon answers");
                assert!(count > 0, "the connection ends");
                answers.extend_from_slice(&bytes[..count]);
            }
        }
        String::from_utf8_lossy(&answers).matches("HTTP/1.1 200 OK").count()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(ask_often)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it has its answers")).sum()
    })
}

/// The value of a line of a `.narinfo`.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or_else(|| panic!("{name}: {text}"))
}

#[test]
fn a_cache_shows_each_client_its_own_paths_and_stands_hostile_ones() {
    let cofferdam = Cofferdam::new();
    let (daemon, address) = start(&cofferdam, "");
    let nix = Nix::new(&cofferdam, &daemon, Release::Trixie);
    // More than fits into all buffers on the way.
    let contents: Vec<u8> =
        (0..4_000_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let file = cofferdam.file("large", &contents);
    let add = |client: &str, file: &std::path::Path| {
        let store = nix.builder_for(client);
        nix.run("nix-store", ["--store", &store, "--add", file.to_str().unwrap()]).succeeds().stdout.trim().to_owned()
    };
    let path = add("alice", &file);
    let part = &path["/nix/store/".len()..][..32];
    let info_path = format!("/{part}.narinfo");

    let (status, _, info) = ask(&address, "GET", &info_path, Some(ALICE));
    let info = String::from_utf8(info).unwrap();
    assert_eq!((status, field(&info, "StorePath")), (200, &*path));
    assert_eq!(field(&info, "NarSize"), field(&info, "FileSize"));
    assert_eq!(field(&info, "Compression"), "none");
    assert!(field(&info, "CA").starts_with("fixed:r:sha256:"), "{info}");
    let nar_path = format!("/{}", field(&info, "URL"));
    let (status, head, nar) = ask(&address, "GET", &nar_path, Some(ALICE));
    assert!(status == 200 && head.contains(&format!("content-length: {}", nar.len())), "{head}");
    assert_eq!(field(&info, "NarSize"), nar.len().to_string());
    let local = cofferdam.file("nar", &nar);
    let hash = nix.run("nix-hash", ["--flat", "--base32", "--type", "sha256", local.to_str().unwrap()]).succeeds();
    assert_eq!(field(&info, "NarHash"), format!("sha256:{}", hash.stdout.trim()));
    let (status, _, cache) = ask(&address, "GET", "/nix-cache-info", Some(BOB));
    assert!(status == 200 && cache.starts_with(b"StoreDir: /nix/store\n"));

    // HEAD says the same without a body.
    for path in [&info_path, &nar_path, "/nix-cache-info"] {
        let (status, head, body) = ask(&address, "HEAD", path, Some(ALICE));
        assert_eq!((status, &*body), (200, &b""[..]), "{path}");
        assert_eq!(head, ask(&address, "GET", path, Some(ALICE)).1, "{path}");
    }

    // What is another's is absent, and nothing is there for a stranger.
    let absent = ask(&address, "GET", &format!("/{}.narinfo", "0".repeat(32)), Some(BOB));
    assert_eq!(absent.0, 404);
    for path in [&info_path, &nar_path, &nar_path.replace(".nar", ".nar.zst")] {
        for method in ["GET", "HEAD"] {
            assert_eq!(ask(&address, method, path, Some(BOB)).0, 404);
        }
        assert_eq!(ask(&address, "GET", path, Some(BOB)), absent, "{path}");
    }
    refuses_what_names_nothing(&address, part, &nar_path, &absent);

    // Alice doesn't read what she asks for, which leaves room for Bob.
    let small = add("bob", &cofferdam.file("small", "small"));
    let stuck: Vec<_> = (0..100).map(|_| begin(&address, "GET", &nar_path, Some(ALICE), "keep-alive")).collect();
    let of_bob = format!("/{}.narinfo", &small["/nix/store/".len()..][..32]);
    let info = String::from_utf8(ask(&address, "GET", &of_bob, Some(BOB)).2).unwrap();
    let (status, _, nar) = ask(&address, "GET", &format!("/{}", field(&info, "URL")), Some(BOB));
    assert_eq!((status, nar.len().to_string()), (200, field(&info, "NarSize").to_owned()));
    drop(stuck);

    assert_eq!(succeeded(&address, &of_bob, 4, 2500), 10_000);
    daemon.end().succeeds();
}

/// A derivation whose output is addressed by its contents, and the output's id and path by Nix 2.34.8.
const FLOATING: &str = r#"
    derivation {
      name = "first";
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" "echo first > $out" ];
      __contentAddressed = true;
      outputHashMode = "recursive";
      outputHashAlgo = "sha256";
    }
"#;
const FLOATING_ID: &str = "sha256:b32424dc3368f39c011c57b4ad398153bc4898e6d765c76c42d930d7246239fb!out";
const FLOATING_PATH: &str = "/nix/store/6ji1386f0ml97vmacwncp5kdyvzplsfh-first";

#[test]
fn nix_fetches_what_floating_outputs_have_become() {
    let cofferdam = Cofferdam::new();
    let (daemon, address) = start(&cofferdam, "");
    let own = fs::read_to_string(cofferdam.state_directory().join("nix/signing.pub")).unwrap();
    let nix = Nix::content_addressing(&cofferdam, &daemon, Release::Forky);
    let built = nix.build_at(&nix.builder_for("alice"), FLOATING).succeeds();
    assert_eq!(built.stdout.trim(), FLOATING_PATH);

    let path = format!("/realisations/{FLOATING_ID}.doi");
    let (status, _, json) = ask(&address, "GET", &path, Some(ALICE));
    assert_eq!(status, 200);
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["id"], &json["outPath"]), (&FLOATING_ID.into(), &FLOATING_PATH["/nix/store/".len()..].into()));
    let absent = ask(&address, "GET", &format!("/{}.narinfo", "0".repeat(32)), Some(BOB));
    assert_eq!(ask(&address, "GET", &path, Some(BOB)), absent);
    assert_eq!(ask(&address, "GET", &path.replace("!out", "!dev"), Some(ALICE)), absent);
    assert_eq!(ask(&address, "GET", &path, None).0, 401);

    let fetch = |client: &str, to: &str| {
        let (to, netrc, cache) = (nix.store(to), netrc(&cofferdam, client), format!("http://{address}"));
        let store = ["--store", to.to_str().unwrap(), "--max-jobs", "0", "--builders", ""];
        let options = [("substitute", "true"), ("substituters", &*cache), ("trusted-public-keys", own.trim())];
        let options = options.into_iter().chain([("netrc-file", &*netrc)]);
        let options = options.flat_map(|(name, value)| ["--option", name, value]);
        let arguments = ["--no-out-link", "-E", FLOATING].into_iter().chain(store).chain(options);
        nix.run("nix-build", arguments)
    };
    assert_eq!(fetch(ALICE, "of-alice").succeeds().stdout.trim(), FLOATING_PATH);
    fetch(BOB, "of-bob").exits_with(100);
    daemon.end().succeeds();
}
