declare -A attrs=(['x']='1' ['y z']=2 )
declare big=705032704
declare builder='/bin/bash'
declare -a empty=()
declare -A emptyattrs=()
declare int=42
declare large=-2147483648
declare -a list=('a b' 1 1 )
declare name='attrs'
declare neg=-7
declare no=
declare nothing=''
declare -A outputs=(['dev']='/nix/store/b3d5vwv9krxhxl786lrpymvb4mzxka66-attrs-dev' ['out']='/nix/store/zbp6mdlwfwd59yn05psfn615m48y00as-attrs' )
declare system='x86_64-linux'
declare text='a'\''b
	"éu0001'
declare whole=3
declare yes=1
