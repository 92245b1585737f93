# services.cofferdam: the daemon, Nix's own builds in microVMs, and builds with the daemons of other hosts.
{ config, lib, pkgs, ... }:

let
  inherit (lib) mkEnableOption mkIf mkMerge mkOption types;
  cfg = config.services.cofferdam;
  format = pkgs.formats.toml { };
  program = "${cfg.package}/bin/cofferdam";
  socket = "/run/cofferdam/daemon.sock";
  # The forced command of a key: it speaks ssh-ng:// and ssh://.
  forced = name: key:
    ''command="${program} --daemon grpc+unix://${socket} nix-daemon --stdio --client ${name}",restrict ${key}'';
  machine = hostName: options: {
    inherit hostName;
    protocol = "ssh-ng";
    sshUser = "cofferdam-nix";
    systems = [ "x86_64-linux" ];
    supportedFeatures = [ "big-parallel" "benchmark" ];
    maxJobs = 8;
  } // options;
in
{
  options.services.cofferdam = {
    enable = mkEnableOption "the daemon of Cofferdam, which runs each build in a microVM";

    package = mkOption {
      type = types.package;
      description = "The package with the program `cofferdam`.";
    };

    image = mkOption {
      type = types.path;
      description = "The guest image, as `cofferdam-images` makes it.";
    };

    settings = mkOption {
      type = format.type;
      default = { };
      example = { build.memory = "4G"; network.allow = [ "*.example.org" ]; };
      description = "The daemon's configuration, which becomes `daemon.toml`. See `docs/daemon.md`.";
    };

    keys = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = { alice = "ssh-ed25519 AAAA… alice"; };
      description = "Public keys whose holders build over ssh as the user `cofferdam-nix`, each a client of its own.";
    };

    localBuilds = mkOption {
      type = types.bool;
      default = false;
      description = "Run the local builds of this host's Nix, which must be 2.34 or later, in microVMs of the daemon.";
    };

    builders = mkOption {
      type = types.attrsOf (types.attrsOf types.anything);
      default = { };
      example = { "builder.example.org" = { sshKey = "/root/.ssh/builder"; maxJobs = 32; }; };
      description = ''
        Hosts with a daemon that build for this one, which needs none itself. Each has those options of `nix.buildMachines` that
        differ: `sshKey`, `publicHostKey`, `maxJobs`, and `supportedFeatures` with `kvm` where the daemon has `nested`.
      '';
    };
  };

  config = mkMerge [
    (mkIf cfg.enable {
      services.cofferdam.settings = {
        image = "${cfg.image}";
        nix.speakers = mkIf (cfg.keys != { }) [ "cofferdam-nix" ];
      };

      environment.systemPackages = [ cfg.package ];
      environment.etc."cofferdam/daemon.toml".source = format.generate "daemon.toml" cfg.settings;

      users.groups.cofferdam = { };
      users.users.cofferdam = {
        isSystemUser = true;
        group = "cofferdam";
        extraGroups = [ "kvm" ];
      };

      systemd.sockets.cofferdam = {
        wantedBy = [ "sockets.target" ];
        listenStreams = [ socket ];
        socketConfig = {
          SocketUser = "cofferdam";
          SocketMode = if cfg.keys == { } then "0600" else "0660";
          SocketGroup = if cfg.keys == { } then "cofferdam" else "cofferdam-nix";
        };
      };

      # The unit of the source tree, so that its walls are the same everywhere.
      systemd.packages = [ cfg.package ];
      systemd.services.cofferdam = {
        path = [ pkgs.qemu_kvm pkgs.e2fsprogs ];
        restartTriggers = [ config.environment.etc."cofferdam/daemon.toml".source ];
        serviceConfig.ExecStart = [ "" "${program} daemon --config /etc/cofferdam/daemon.toml" ];
      };
    })

    (mkIf (cfg.enable && cfg.keys != { }) {
      users.groups.cofferdam-nix = { };
      users.users.cofferdam-nix = {
        isSystemUser = true;
        group = "cofferdam-nix";
        useDefaultShell = true;
        openssh.authorizedKeys.keys = lib.mapAttrsToList forced cfg.keys;
      };
    })

    (mkIf (cfg.enable && cfg.localBuilds) {
      nix.settings = {
        extra-experimental-features = [ "external-builders" ];
        external-builders = builtins.toJSON [
          {
            systems = [ "x86_64-linux" ];
            inherit program;
            args = [ "nix-external-builder" "--daemon" "grpc+unix://${socket}" ];
          }
        ];
      };
    })

    (mkIf (cfg.builders != { }) {
      nix.distributedBuilds = true;
      nix.buildMachines = lib.mapAttrsToList machine cfg.builders;
    })
  ];
}
