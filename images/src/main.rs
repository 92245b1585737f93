//! `cofferdam-image`: makes the guest image, or compiles the minimal kernel, and prints its path.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cofferdam_images::debian::Debian;
use cofferdam_images::{KernelChoice, Options, ensure, minimal};

const EXAMPLES: &str = "Examples:
  cofferdam-image                   make the image in the default directory
  cofferdam-image --kernel debian   use Debian's cloud kernel, which is ready at once
  cofferdam-image kernel            compile the minimal kernel and make no image
  cofferdam-image --out ./image     use another directory
  cofferdam-image --refresh         use the newest packages";

/// Make the guest image (kernel, initramfs, scratch template) and print its directory.
///
/// Nothing is installed, and no privileges are needed. An image that is up to date stays as it is.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// The image's directory [default: $COFFERDAM_IMAGE, or image in the cache directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// "debian", or a kernel file with everything built in [default: the minimal kernel, compiled first if need be, which takes
    /// some minutes]
    #[arg(long, value_name = "KERNEL", value_parser = kernel_choice)]
    kernel: Option<KernelChoice>,
    /// Look for newer packages
    #[arg(long)]
    refresh: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Compile the minimal kernel, which takes some minutes, and print its path. A compiled kernel is used again
    Kernel {
        /// Look for a newer source
        #[arg(long)]
        refresh: bool,
    },
}

fn kernel_choice(text: &str) -> Result<KernelChoice, std::convert::Infallible> {
    Ok(if text == "debian" { KernelChoice::Debian } else { KernelChoice::File(text.into()) })
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  caused by: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<PathBuf, Box<dyn Error>> {
    let mut options = Options::default();
    if let Some(Action::Kernel { refresh }) = arguments.action {
        let debian = Debian::open(&options.cache, refresh, options.progress)?;
        return Ok(minimal::compile(&options.cache, &debian, options.progress)?);
    }
    options.refresh = arguments.refresh;
    options.kernel = match arguments.kernel {
        Some(kernel) => kernel,
        None => {
            let debian = Debian::open(&options.cache, options.refresh, options.progress)?;
            KernelChoice::File(minimal::compile(&options.cache, &debian, options.progress)?)
        }
    };
    options.out = arguments.out.unwrap_or(options.out);
    ensure(&options)?;
    Ok(options.out)
}
