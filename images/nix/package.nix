# The program alone. The guest image is made by `cofferdam-images`, which needs Debian's packages or a compiled kernel.
{ lib, rustPlatform, pkg-config, libcap_ng, src }:

rustPlatform.buildRustPackage {
  pname = "cofferdam";
  version = "0.1.0";
  inherit src;
  cargoLock.lockFile = src + "/Cargo.lock";
  cargoBuildFlags = [ "--package" "cofferdam" ];
  nativeBuildInputs = [ pkg-config ];
  buildInputs = [ libcap_ng ];
  # The tests start machines.
  doCheck = false;
  postInstall = ''
    install -D -m 0644 -t $out/lib/systemd/system host/cofferdam.service
  '';
  meta = {
    description = "Runs one build inside one microVM";
    license = with lib.licenses; [ mit asl20 ];
    mainProgram = "cofferdam";
    platforms = [ "x86_64-linux" ];
  };
}
