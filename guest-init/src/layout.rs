//! The paths of the guest's own root file system.

/// Mount point of the inputs.
pub(crate) const INPUTS: &str = "/inputs";
/// Mount point of the host paths, if the build has any.
pub(crate) const PATHS: &str = "/paths";
/// Mount point of the scratch disk.
pub(crate) const SCRATCH: &str = "/scratch";
/// What the build writes, in one directory of the scratch disk: ext4 puts the directories at its top far apart, and each takes
/// tables of its own to read.
pub(crate) const LAYERS: &str = "/scratch/layers";
/// Mount point of a tmpfs with everything in the build's root that is neither an input nor writable.
pub(crate) const SKELETON: &str = "/skeleton";
/// Mount point of the build's root.
pub(crate) const ROOT: &str = "/build-root";
/// The static shell: `/bin/sh` of a build that asks for one.
pub(crate) const SHELL: &str = "/sh";
