# nix build 'path/to/cofferdam?dir=images/nix'
{
  description = "One build inside one microVM";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      pkgs = nixpkgs.legacyPackages.x86_64-linux;
      cofferdam = pkgs.callPackage ./package.nix { src = ../..; };
    in
    {
      packages.x86_64-linux = {
        inherit cofferdam;
        default = cofferdam;
      };
      nixosModules.default = { lib, ... }: {
        imports = [ ./module.nix ];
        services.cofferdam.package = lib.mkDefault cofferdam;
      };
    };
}
