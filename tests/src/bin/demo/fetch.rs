//! The second act: a build fetches a package from the mirror of this host's apt, and reaches nothing else.

use std::{
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam::network::special;
use cofferdam_images::{cache_dir, debian::Debian};

use crate::{Cofferdam, ROOT_DIRECTORIES, say, seconds};

/// The package that is fetched.
const PACKAGE: &str = "hello";

/// The packages for fetching it. Their dependencies come along.
const TOOLS: [&str; 3] = ["coreutils", "dash", "wget"];

/// The host's certificates, for mirrors with HTTPS.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

const SCRIPT: &str =
    "wget --no-verbose --output-document=package.deb $URI && echo $SHA256 package.deb | sha256sum --check";

/// A name that no rule has.
const UNLISTED: &str = "example.org";

/// How long the mirror may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The file to fetch, and where it is.
struct Mirror {
    uri: String,
    sha256: String,
    host: String,
    port: u16,
    addresses: Vec<IpAddr>,
}

/// Plays the act, unless this host has no network.
pub(crate) fn act(cofferdam: &Cofferdam, directory: &Path) -> Result<()> {
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    let mirror = match Mirror::of_host(&debian) {
        Ok(mirror) => mirror,
        Err(why) => {
            println!("\nA build that fetches is skipped, since this host reaches no mirror of Debian: {why:#}");
            return Ok(());
        }
    };
    let root = directory.join("tools");
    for package in &debian.closure(&TOOLS)? {
        Debian::unpack(package, &root)?;
    }
    let out = directory.join("fetched");

    say("Fetch: a build that may connect to the mirror of this host's apt");
    let mut arguments: Vec<String> =
        ["run", "--inputs-dir", "", "--env", "PATH=/usr/bin:/bin"].map(str::to_owned).into();
    for name in ROOT_DIRECTORIES {
        arguments.extend(["--input".to_owned(), format!("{name}={}", root.join(name).display())]);
    }
    if mirror.uri.starts_with("https:") {
        arguments.extend(["--input".to_owned(), format!("{}={CERTIFICATES}", &CERTIFICATES[1..])]);
    }
    arguments.extend(mirror.rules());
    let mut fetch = arguments.clone();
    fetch.extend([("URI", &mirror.uri), ("SHA256", &mirror.sha256)].map(|(key, value)| format!("--env={key}={value}")));
    let output = format!("--out={}", out.display());
    fetch.extend(["--output=build/package.deb", &output, "--", "/bin/sh", "-c", SCRIPT].map(str::to_owned));
    let (printed, took) = cofferdam.run(&fetch)?;
    print!("{printed}");
    println!("  took {}", seconds(took));
    let package = out.join("build/package.deb");
    let about = Command::new("dpkg-deb").arg("--field").arg(package).args(["Package", "Version"]).output();
    let about = about.context("can't run dpkg-deb")?;
    ensure!(about.status.success(), "what was fetched is no package");
    print!("{}", String::from_utf8_lossy(&about.stdout));

    say("The same build, when it wants another server");
    arguments.extend(["--", "/usr/bin/wget", "--no-verbose", &format!("https://{UNLISTED}/")].map(str::to_owned));
    cofferdam.fails(&arguments)
}

impl Mirror {
    /// Where this host's apt gets the package from.
    fn of_host(debian: &Debian) -> Result<Self> {
        let (uri, sha256) = debian.location(PACKAGE)?;
        let (scheme, rest) = uri.split_once("://").context("its address is no URI")?;
        let default = match scheme {
            "http" => 80,
            "https" => 443,
            _ => bail!("it is at {uri}"),
        };
        let server = rest.split('/').next().unwrap_or_default();
        let (host, port) = match server.rsplit_once(':') {
            Some((host, port)) => (host.to_owned(), port.parse().context("its port is no number")?),
            None => (server.to_owned(), default),
        };
        let found: Vec<SocketAddr> = (&*host, port).to_socket_addrs().context("its name can't be resolved")?.collect();
        let is_reached = found.iter().any(|address| TcpStream::connect_timeout(address, PATIENCE).is_ok());
        ensure!(is_reached, "{server} can't be reached without a proxy");
        let addresses = found.iter().map(SocketAddr::ip).collect();
        Ok(Self { uri, sha256, host, port, addresses })
    }

    /// The flags that let a build connect to it.
    fn rules(&self) -> Vec<String> {
        let Self { host, port, .. } = self;
        let by_default = matches!(port, 80 | 443);
        let rule = if by_default { host.clone() } else { format!("{host}:{port} tls=false") };
        let mut rules = vec!["--network".to_owned(), format!("--allow-host={rule}")];
        for address in &self.addresses {
            if let Some(what) = special(*address) {
                println!("  the mirror's address {address} is {what}, so it needs a rule of its own");
                let network = if address.is_ipv4() { format!("{address}/32") } else { format!("[{address}]/128") };
                rules.push(format!("--allow-address={network}:{port}"));
            }
        }
        rules
    }
}
